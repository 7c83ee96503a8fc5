"""The four coders of room 06 against one another: the same symbols back, about the same bytes, and no harm from damage.

torchac and constriction are optional: where one cannot run, its tests are skipped with the reason.
"""

import os
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hific_nb import coders, rans
from hific_nb.coders import CoderUnavailableError, coder_name, get_coder, list_coders, table_bits
from hific_nb.entropy_models import IndexedTables, tables_from_pmfs
from hific_nb.rans import CodingError, CorruptStreamError
from test_coding import INT32, LATENTS, big_integer, from_big_integer, latents, parts_strategy, random_tables

NAMES = ["rans", "rans-numpy", "torchac", "constriction"]
quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def available(name):
    try: return get_coder(name)
    except CoderUnavailableError as error: pytest.skip(str(error))


@pytest.fixture(params=NAMES)
def coder(request):
    return available(request.param)


@pytest.fixture(params=NAMES[2:])
def guest(request):
    return available(request.param)


def decode(coder, data, parts):
    decoder = coder.decoder(data)
    out = [decoder.read(indexes, tables) for _, indexes, tables in parts]
    decoder.close()
    return out


def assert_same(parts, decoded):
    for (symbols, _, _), out in zip(parts, decoded, strict=True):
        assert out.dtype == np.int32 and np.array_equal(out, symbols)


# ------------------------------------------------------------------------------------------- what goes in comes out


def test_names_and_numbers_never_change():
    assert list_coders()[:4] == NAMES
    assert [coder_name(number) for number in (1, 2, 3, 127)] == ["rans", "torchac", "constriction", None]


@quick
@given(parts_strategy)
def test_all_coders_give_the_same_symbols_back_in_about_the_ideal_number_of_bytes(coder, parts):
    data = coder.encode(parts)
    assert data == coder.encode(parts)
    assert_same(parts, decode(coder, data, parts))
    # At most the ideal under the tables, a part's sections, and for each symbol one bit of rounding.
    total = sum(len(symbols) for symbols, _, _ in parts)
    assert 8 * len(data) <= table_bits(parts) + total + len(parts) * 8 * (5 * 6 + 1) + 8 * 9


@quick
@given(parts_strategy)
def test_all_four_and_one_big_integer_tell_the_same(parts):
    """What each of them reads from its own stream, held against what an endless integer holds."""
    here = []
    for name in NAMES:
        try: here.append(get_coder(name))
        except CoderUnavailableError: pass
    assert len(here) >= 2
    wanted, rest = from_big_integer(big_integer(parts), parts)
    assert rest == 1
    for coder in here:
        found = decode(coder, coder.encode(parts), parts)
        assert all(np.array_equal(out, other) for out, other in zip(found, wanted, strict=True)), coder.name


@quick
@given(random_tables(), st.lists(st.integers(*INT32), min_size=1, max_size=20))
def test_any_int32_from_any_row(coder, tables, values):
    symbols = np.repeat(np.array([*values, *INT32], np.int32), tables.rows)
    part = [(symbols, np.tile(np.arange(tables.rows), len(values) + 2), tables)]
    assert_same(part, decode(coder, coder.encode(part), part))


def test_nothing_and_one_symbol(coder):
    none = np.zeros(0, np.int32)
    for parts in ([], [(none, none, LATENTS)], [(none, none, LATENTS)] * 3):
        assert coder.encode(parts) == b""
        assert_same(parts, decode(coder, b"", parts))
    with pytest.raises(CorruptStreamError): coder.decoder(b"").read([0], LATENTS)
    for value in (0, 3, -1, *INT32):
        parts = [(none, none, LATENTS), (np.array([value], np.int32), np.array([40]), LATENTS), (none, none, LATENTS)]
        data = coder.encode(parts)
        assert 0 < len(data) <= 16
        assert_same(parts, decode(coder, data, parts))


def test_rows_of_any_integer_type_give_the_same_bytes(coder):
    part = symbols, rows, _ = latents(9000, 8)
    data = coder.encode([part])
    for dtype in (np.uint8, np.int8, np.uint16, ">u2", np.int32, np.uint64):
        kept = rows.astype(dtype)
        assert coder.encode([(symbols, kept, LATENTS)]) == data
        assert_same([part], decode(coder, data, [(symbols, kept, LATENTS)]))


@pytest.mark.parametrize("lanes", [0, 256, 1.5, "2", True])
def test_lanes_that_are_none(lanes):
    with pytest.raises(CodingError, match="1 to 255 lanes"): rans.rans_encode([], lanes)


def test_whole_numbers_of_numpy():
    tables = tables_from_pmfs([np.array([0.5, 0.25])], [7], precision=np.uint8(14))
    part = np.array([7, 8, 9] * 50), np.zeros(150, int), tables
    assert rans.rans_encode([part], np.uint8(4)) == rans.rans_encode([part], 4)


@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 7, 255])
@pytest.mark.parametrize("chunk", [2100, 4096])
def test_chunks_do_not_show(lanes, chunk):
    part = latents(5000, 9, spread=1.0)
    whole = rans.rans_encode([part], lanes)
    with mock.patch.object(rans, "_CHUNK", chunk):
        for compiled in (True, False):
            assert rans.rans_encode([part], lanes, compiled) == whole
            decoder = rans.RansDecoder(whole, compiled)
            assert np.array_equal(decoder.read(*part[1:]), part[0])
            decoder.close()


def test_a_part_may_depend_on_the_one_before(coder):
    z, z_rows, _ = latents(300, 12)
    rows_of = lambda z: np.repeat(np.clip(np.abs(z) * 9, 0, 95), 20)
    y = np.rint(np.random.default_rng(1).normal(size=6000) * 3).astype(np.int32)
    decoder = coder.decoder(coder.encode([(z, z_rows, LATENTS), (y, rows_of(z), LATENTS)]))
    assert np.array_equal(decoder.read(rows_of(decoder.read(z_rows, LATENTS)), LATENTS), y)
    decoder.close()


@pytest.mark.parametrize("block, elements", [(1, 1 << 15), (7, 1 << 15), (1000, 70_000), (1 << 20, 1 << 22)])
def test_work_in_blocks(guest, block, elements):
    part = [latents(3001, 4, spread=0.5)]
    with mock.patch.multiple(coders, _BLOCK=block, _CDF_ELEMENTS=elements):
        assert_same(part, decode(guest, guest.encode(part), part))


def test_the_widest_rows(guest):
    for precision, offset in ((15, INT32[0]), (15, INT32[1] - 2**15), (1, 0)):
        size = 2**precision
        cdf = np.stack([np.arange(size + 1), np.minimum(np.arange(size + 1) * (size // 2), size)]).astype(np.uint32)
        tables = IndexedTables(cdf, np.array([size, 2], np.int32), np.array([offset] * 2, np.int32), precision).validate()
        symbols = (offset + np.arange(0, size, max(1, size // 500))).astype(np.int32)
        for rows in (np.zeros(len(symbols), int), np.arange(len(symbols)) % 2):
            part = [(symbols, rows, tables)]
            assert_same(part, decode(guest, guest.encode(part), part))


FIXED = [(np.array([0, 1, -1, 0, 5, -300, INT32[1], INT32[0], 2]), np.array([0, 20, 40, 95, 95, 95, 60, 3, 31]), LATENTS),
         (np.array([7, 8, 9]), np.zeros(3, int), tables_from_pmfs([np.array([0.5, 0.25])], [7], precision=8))]
STREAMS = {
    "rans": "01ab3d030005d5cf07fe3fffffffc8ff3fffffffdf7f7a",
    "torchac": "030000fefb800100006a020000fffa0400007fb2961488ffffff8cfffffffd0100005a00",
    "constriction": "0600c0ffffff8fff52d67f64d3dae4a462172d440b000000",
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams_of_today_are_read_for_ever(name):
    coder = available(name)
    assert coder.encode(FIXED).hex() == STREAMS[name]
    assert_same(FIXED, decode(coder, bytes.fromhex(STREAMS[name]), FIXED))


@pytest.mark.parametrize("rate, spread", [(0.18, -2.38), (0.6, -1.5), (2.1, -0.15)])
def test_bytes_beside_ours(guest, rate, spread):
    part = [latents(100_000, 5, spread)]
    assert len(guest.encode(part)) == pytest.approx(len(get_coder("rans").encode(part)), rel=0.004, abs=20)


# --------------------------------------------------------------------------------------------------------- damage


def assert_refused_or_shaped(coder, data, parts):
    try: out = decode(coder, data, parts)
    except CorruptStreamError as error: return str(error)
    for symbols, (_, indexes, _) in zip(out, parts, strict=True): assert symbols.dtype == np.int32 and len(symbols) == len(indexes)


@settings(quick, max_examples=150)
@given(parts_strategy, st.randoms(use_true_random=False))
def test_damage_is_named_or_gives_symbols_of_the_right_shape(guest, parts, random):
    data = bytearray(guest.encode(parts))
    for _ in range(random.randint(1, 4)):
        kind, at = random.randrange(4), random.randrange(len(data) + 1)
        if kind == 0 and data: data[at % len(data)] ^= 1 << random.randrange(8)
        elif kind == 1: del data[at:]
        elif kind == 2: data[at:at] = random.randbytes(random.randrange(6))
        else: data[at:at + 8] = random.randbytes(8)
    assert_refused_or_shaped(guest, bytes(data), parts)


def test_noise_as_a_stream(guest):
    rng = np.random.default_rng(11)
    part = [latents(3000, 3, spread=1.0)]
    for size in (0, 1, 3, 4, 8, 40, 4000):
        for noise in (rng.bytes(size), bytes(size), b"\xff" * size): assert_refused_or_shaped(guest, noise, part)


def torchac_stream(*sections, escapes=b""):
    return b"".join(len(s).to_bytes(3, "little") + s for s in sections) + escapes


def test_noise_behind_right_lengths():
    "The native decoder itself gets the garbage: any bytes for rows of every width."
    coder, rng = available("torchac"), np.random.default_rng(2)
    _, indexes, _ = latents(3000, 3, spread=1.0)
    sections = len(list(coders._sections(indexes, coders._torchac_arrays(LATENTS, coders.coding_tables(LATENTS)))))
    assert sections >= 3
    for k in range(60):
        noise = [(rng.bytes(size), bytes(size), b"\xff" * size)[k % 3] for size in rng.integers(0, 900, sections)]
        for escapes in (b"", bytes(3000), b"\x11" * 3000):
            assert_refused_or_shaped(coder, torchac_stream(*noise, escapes=escapes), [(None, indexes, LATENTS)])
    with pytest.raises(CorruptStreamError, match="symbol that no encoder"):  # a narrow row in a wide array
        coder.decoder(torchac_stream(b"\xff" * 9)).read([0], LATENTS)


def test_every_cut_is_seen(guest):
    part = [latents(1500, 6)]
    data = guest.encode(part)
    assert all(assert_refused_or_shaped(guest, data[:n], part) for n in range(len(data)))
    assert assert_refused_or_shaped(guest, data + b"\1\0\0\0", part)


@pytest.mark.parametrize("escapes", [b"\xa0" + bytes(5), b"\x20\x50", b"\x21\x11", b"\x9f" + b"\xff" * 4,
                                     b"\x92\0\0\0\0", b"\x21"])
def test_forged_escapes_are_refused_by_torchac(escapes):
    "Ten digits, a leading zero, a filled last half byte, values beyond int32, too few bytes."
    coder = available("torchac")
    tables = tables_from_pmfs([np.array([0.5])], [2**31 - 3], 8)
    section = torchac_stream(b"\xff" * 4)  # one symbol of the highest slot, the escape
    for row in ([0], [0, 0]):
        decoder = coder.decoder(section + escapes)
        with pytest.raises(CorruptStreamError): decoder.read(row, tables)


def test_forged_escapes_are_refused_by_constriction():
    coder = available("constriction")
    import constriction

    tables = tables_from_pmfs([np.array([0.5])], [2**31 - 3], 8)
    for digits in ([10] + [1] * 10, [15] + [1] * 15, [2, 0, 5], [9] + [15] * 9):
        stream = constriction.stream
        forged = stream.stack.AnsCoder(np.ones(1, np.uint32))
        forged.encode_reverse(np.array(digits, np.int32), stream.model.Uniform(16))
        forged.encode_reverse(np.array([1], np.int32), coders._model(stream, tables, 0))
        decoder = coder.decoder(forged.get_compressed().astype("<u4").tobytes())
        with pytest.raises(CorruptStreamError, match="no encoder writes"): decoder.read([0], tables)


def test_the_state_of_constriction_shows_nearly_every_flip():
    coder, part = available("constriction"), [latents(600, 5)]
    data, unseen = coder.encode(part), 0
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        unseen += not assert_refused_or_shaped(coder, bytes(damaged), part)
    assert unseen <= 1


# -------------------------------------------------------------------------------------------- memory, and absence


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_sixteen_million_symbols_in_bounded_memory(coder):
    "In a process of its own: the peak beyond the arrays that are given and returned stays below 96 MB."
    code = """
import re, sys
import numpy as np
from hific_nb.coders import get_coder
from hific_nb.entropy_models import scale_grid, scale_tables
coder, tables, n = get_coder(sys.argv[1]), scale_tables(scale_grid()), 1 << 24
rows = np.full(n, 20, np.uint8)
symbols = np.zeros(n, np.int32)
symbols[::7] = 1
def peak(): return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024
coder.decoder(coder.encode([(symbols[:99], rows[:99], tables)])).read(rows[:99], tables)
before = peak()
data = coder.encode([(symbols, rows, tables)])
decoder = coder.decoder(data)
out = decoder.read(rows, tables)
decoder.close()
assert peak() - before < 64 + 96, (before, peak())
assert np.array_equal(out, symbols)
"""
    done = subprocess.run([sys.executable, "-c", code, coder.name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout, "importing a coder prints nothing"


@pytest.mark.parametrize("name", NAMES[2:])
def test_without_the_package_there_is_a_line_to_type(name):
    hidden = {module: None for module in ("constriction", "torchac")}
    with mock.patch.dict(sys.modules, hidden), mock.patch("importlib.util.find_spec", return_value=None):
        if name == "torchac": del sys.modules["torchac"]
        for wanted in (name, {"torchac": 2, "constriction": 3}[name]):
            with pytest.raises(CoderUnavailableError, match=r"package is missing.*pip install 'hific_nb\[coders\]'") as raised:
                get_coder(wanted)
            assert "\n" not in str(raised.value)
        assert coder_name(2) == "torchac" and name in list_coders()


def test_without_a_compiler_there_is_a_line_to_type_and_a_killed_build_is_not_waited_for(tmp_path):
    available("torchac")
    folder = tmp_path / "torchac_backend"
    folder.mkdir()
    (folder / "lock").touch()
    os.utime(folder / "lock", (0, 0))  # as a process leaves it that was killed while it compiled
    code = ("from hific_nb.coders import CoderUnavailableError, get_coder\n"
            "try: get_coder('torchac')\n"
            "except CoderUnavailableError as error: print(error)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                          env=os.environ | {"CXX": "/no/compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert "pip install 'hific_nb[coders]'" in done.stdout and "g++" in done.stdout and done.stdout.count("\n") == 1


def test_a_file_never_starts_a_compiler(tmp_path):
    "Of the two ways to ask for torchac, only the one that a person types may compile it; what is compiled is used."
    available("torchac")
    code = ("import sys\n"
            "from hific_nb.coders import CoderUnavailableError, TorchacCoder, get_coder\n"
            "for ask in (lambda: get_coder(2), lambda: TorchacCoder().decoder(b'')):\n"
            "    try: ask()\n"
            "    except CoderUnavailableError as error: print(error)\n"
            "    else: print('here')\n")
    def ask(**variables):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()
    said = ask(TORCH_EXTENSIONS_DIR=str(tmp_path), CXX="/no/compiler")
    assert len(said) == 2 and "not compiled on this machine" in said[0] and said[0] == said[1]
    assert "`python -c \"import hific_nb.coders as c; c.get_coder('torchac')\"`" in said[0]
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    assert ask(CXX="/no/compiler", PATH="") == ["here", "here"]  # nor is one needed where it is compiled


FRESH = """
import sys
import numpy as np
from hific_nb.coders import get_coder
from hific_nb.entropy_models import tables_from_pmfs
tables, zeros = tables_from_pmfs([[0.5]], [0]), np.zeros(5000, np.int32)
symbols = np.arange(5000, dtype=np.int32) % 3
data = get_coder("rans").encode([(symbols, zeros, tables)])
assert (get_coder("rans").decoder(data).read(zeros, tables) == symbols).all()
assert data == get_coder("rans-numpy").encode([(symbols, zeros, tables)])
print("numba" in sys.modules)
"""


def test_compiled_code_is_kept_and_loaded_without_numba(tmp_path):
    """What a fresh process waits for is numba: half a second to import, seconds to compile. It needs it once, and says so;
    a damaged file is made again, and numba's own switches are heard."""
    def fresh(**variables):
        env = {key: value for key, value in os.environ.items() if not key.startswith("NUMBA_")}
        done = subprocess.run([sys.executable, "-W", "error", "-c", FRESH], capture_output=True, text=True,
                              env=env | dict(NUMBA_CACHE_DIR=str(tmp_path / "kept")) | variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), done.stderr
    imported, said = fresh()
    assert imported == "True" and [line.split(" for ")[0] for line in said.splitlines()] == [
        "hific_nb compiles its entropy encoder", "hific_nb compiles its entropy decoder"]
    assert fresh() == ("False", "")
    files = {path.name.split("-")[1]: path for path in (tmp_path / "kept").iterdir()}
    good = {name: path.read_bytes() for name, path in files.items()}
    files["encode"].write_bytes(good["encode"][:-1])
    files["decode"].write_bytes(b"")
    assert fresh()[0] == "True" and set(files) == {"encode", "decode"} and fresh() == ("False", "")
    assert fresh(NUMBA_BOUNDSCHECK="1") == ("True", "")
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {path.name for path in files.values()}


def test_kernels_refuse_arrays_that_they_were_not_made_for():
    kernel = rans._compiled("decode")
    if not isinstance(kernel, rans._Native): pytest.skip("numba's own kernel, which checks its arguments itself")
    ready = rans.coding_tables(LATENTS)
    right = [np.zeros(4, np.int32), np.zeros(4, np.uint32), ready.rows, ready.decoding, ready.buckets, ready.bucket_bits,
             ready.precision, np.full(1, 1 << 20), np.zeros(9, np.uint16), 0]
    assert kernel(*right) >= 0
    for k, wrong in ((0, np.zeros(4, np.int64)), (1, np.zeros(4, np.uint8)), (1, np.zeros(8, np.uint32)[::2]),
                     (2, ready.rows.T), (8, np.zeros((3, 3), np.uint16))):
        with pytest.raises(TypeError): kernel(*right[:k], wrong, *right[k + 1:])
    with pytest.raises(ValueError): kernel(*right[:-1])


def test_nothing_optional_is_imported_before_it_is_wanted():
    code = ("import sys, hific_nb.coders as c; c.get_coder(); c.coder_name(2)\n"
            "assert not {'torchac', 'constriction', 'numba'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)
