"""The coverage-guided fuzzer: what reads a `.hfc` file, steered by the branches that inputs take, for as long as one likes.

    pip install atheris                                   # Linux on x86-64
    python benchmarks/fuzz_atheris.py -max_total_time=3600 [corpus_folder]

Arguments are libFuzzer's (`-help=1`). Every input is tried as it is and with a checksum that fits, by the compiled and
by the plain path of the coder, and judged as in tests/fuzzing.py. The container, the codec and the plain decoding loop are
instrumented; compiled code is not. What fails is printed with its bytes and left as `crash-...`; see it again with
`python tests/fuzzing.py --hex`. Every minute the number of inputs of each outcome is printed as a line of JSON.
"""

import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

try: import atheris
except ImportError: sys.exit("The coverage-guided fuzzer needs atheris: pip install atheris (Linux on x86-64).")

from hific_nb import coders, rans  # noqa: E402, F401  numba compiles functions as they are written, not as instrumented

with atheris.instrument_imports(include=["hific_nb.hfc", "hific_nb.codec"]):
    import hific_nb.codec
    import hific_nb.hfc  # noqa: F401

import fuzzing  # noqa: E402

rans._decode_plain = atheris.instrument_func(rans._decode_plain)
MOST = 8192  # bytes of an input


def main():
    codecs, files = fuzzing.prepare()
    mutator, outcomes, began, told = fuzzing.Mutator(codecs, files), Counter(), time.perf_counter(), 0

    def one(data: bytes):
        nonlocal told
        minutes = int((time.perf_counter() - began) // 60)
        if minutes > told:
            told = minutes
            line = dict(minutes=minutes, decoded=sum(outcomes.values()), outcomes=dict(sorted(outcomes.items())))
            print(json.dumps(line), file=sys.stderr, flush=True)
        for form in {data, fuzzing.seal(data)}:
            try: outcomes[fuzzing.examine(codecs, form, both=True)] += 1
            except BaseException:
                print(f"python tests/fuzzing.py --hex <<< {form.hex()}", file=sys.stderr, flush=True)
                raise

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        "libFuzzer's own changes, with blows that know what a file is made of in between; the checksum is put right."
        if seed % 4 == 0: data = mutator(seed)
        elif seed % 4 == 1: data = fuzzing.damage(fuzzing.random.Random(seed), data, mutator.files)
        else: data = atheris.Mutate(data, len(data))
        return fuzzing.seal(data)[:most]

    for data in files.values(): one(data)
    with tempfile.TemporaryDirectory() as seeds:
        for name, data in files.items(): Path(seeds, name).write_bytes(data)
        folders = [a for a in sys.argv[1:] if not a.startswith("-")]
        options = [a for a in sys.argv[1:] if a.startswith("-")]
        # The first folder is the one that libFuzzer adds to.
        defaults = [f"-max_len={MOST}", f"-timeout={5 * fuzzing.SECONDS}", "-rss_limit_mb=2048", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *defaults, *options, *folders, seeds], one, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__": main()
