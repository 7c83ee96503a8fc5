"""Refinement: never larger, never further, read by every decoder; asked for wherever pictures are compressed."""

import copy
import csv
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import hific_nb.codec as codec_room
import hific_nb.pillow  # noqa: F401
import hific_nb.refinement as refinement
from hific_nb.bulk import MANIFEST, BulkError, BulkSettings, run_bulk
from hific_nb.cli import main, run_job
from hific_nb.codec import Codec, CodecError
from hific_nb.config import HificError, ModelConfig
from hific_nb.data import find_images, read_image, sample_photo
from hific_nb.evaluation import EvaluationError, evaluate, find_contenders
from hific_nb.metrics import image_metrics
from hific_nb.model import Model
from hific_nb.perceptual import PerceptualError
from hific_nb.refinement import soft_round
from hific_nb.zoo import model_info

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def codec(): return Codec.from_pretrained("hific-lite", device="cpu")


@pytest.fixture
def weights(shared, monkeypatch):
    refinement.get_distances.cache_clear()
    monkeypatch.setenv("HIFIC_LPIPS_WEIGHTS", str(shared / "weights"))
    yield
    refinement.get_distances.cache_clear()


@pytest.fixture
def no_lpips(monkeypatch):
    "What descends LPIPS by default descends the MSE alone: quick, and without weights."
    monkeypatch.setattr(refinement, "get_distances", lambda *_: ())


def picture(size=(160, 96)): return sample_photo("chelsea").resize(size)


def psnr(codec, image, latents): return image_metrics(image, codec.decompress(codec.encode(latents)))["psnr"]


def plain(codec, image, quality=30): return codec.quantize(codec.analyse(image), codec.level_of(quality))


def by_mse(codec, image, quality=30, steps=30, **options):
    return codec.refine(image, codec.analyse(image), codec.level_of(quality), steps, perceptual="none", **options)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.06, 0.001])
def test_soft_rounding_keeps_whole_numbers_order_and_gradients(temperature):
    whole = torch.arange(-3.0, 4.0)
    assert torch.allclose(soft_round(whole, temperature), whole, atol=1e-3 if temperature < 0.5 else 0.02)
    r = torch.linspace(-2.5, 2.5, 1001, requires_grad=True)
    s = soft_round(r, temperature)
    s.sum().backward()
    assert (s.diff() > -1e-6).all() and (s - r).abs().max() <= 0.51 and r.grad.isfinite().all() and (r.grad >= 0).all()


@pytest.mark.parametrize("quality", [0, 45, 100])
def test_a_refined_file_is_no_larger_nearer_and_reads_as_any_other(codec, quality):
    image = picture()
    before, after = plain(codec, image, quality), by_mse(codec, image, quality)
    data = codec.encode(after)
    assert len(data) <= len(codec.encode(before)) and psnr(codec, image, after) > psnr(codec, image, before) + 0.03
    assert (after.symbols != before.symbols).any()
    assert np.array_equal(after.hyperlatents, before.hyperlatents) and np.array_equal(after.indexes, before.indexes)
    read = Codec.from_pretrained("hific-lite", device="cpu").decode_latents(data)
    assert np.array_equal(read.symbols, after.symbols) and torch.allclose(read.y_hat, after.y_hat, atol=1e-5)


def test_on_a_photo_what_nobody_descended_is_nearer_as_well(codec, weights, shared):
    from hific_nb.perceptual import LPIPS

    image = read_image(shared / "data/kodak/kodim15.png").crop((256, 128, 512, 384))
    judge, x = LPIPS("vgg"), torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    files = [codec.compress(image, quality="low", refine=n) for n in (0, 20)]
    decoded = [codec.decompress(data) for data in files]
    with torch.no_grad():
        far, near = (judge(torch.from_numpy(np.array(p)).permute(2, 0, 1)[None] / 255, x).item() for p in decoded)
    assert len(files[1]) <= len(files[0]) and near < 0.97 * far
    assert image_metrics(image, decoded[1])["psnr"] > image_metrics(image, decoded[0])["psnr"] - 0.3


def test_a_large_picture_goes_piece_by_piece_with_its_alpha_and_tiles(codec, monkeypatch):
    image = picture((208, 160)).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    monkeypatch.setattr(codec_room, "REFINING", 2 ** 24 // 60)
    monkeypatch.setattr(codec_room, "AROUND", 2)
    told = []
    after = by_mse(codec, image, steps=4, tile=64, memory=2 ** 24, progress=lambda *k: told.append(k))
    assert told == [(k + 1, len(told)) for k in range(len(told))] and len(told) >= 4 * 4
    before, (data, first) = plain(codec, image), (codec.encode(latents, 64) for latents in (after, plain(codec, image)))
    decoded = codec.decompress(data)
    assert len(data) <= len(first) and np.array_equal(np.array(decoded)[..., 3], np.array(image)[..., 3])
    changed = (after.symbols != before.symbols).any(0)
    assert all(part.any() for half in np.array_split(changed, 2) for part in np.array_split(half, 2, 1))
    rgb = partial(Image.Image.convert, mode="RGB")
    assert image_metrics(rgb(image), rgb(decoded))["psnr"] > image_metrics(rgb(image), rgb(codec.decompress(first)))["psnr"]


@pytest.mark.parametrize("size", [(1, 1), (17, 5), (40, 33)])
def test_small_pictures(codec, weights, size):
    image = picture(size)
    data = codec.compress(image, quality=60, refine=3)
    assert codec.decompress(data).size == size and len(data) <= len(codec.compress(image, quality=60))


@pytest.mark.parametrize("name, times", [("hific-lite-base", 1), ("hific-lite", 2)])
def test_lpips_weighs_as_in_the_training(no_lpips, monkeypatch, name, times):
    """Of a model that was trained with the sum of two networks' LPIPS, each counts twice, for here they take turns."""
    seen, real = [], refinement.view_distance
    monkeypatch.setattr(refinement, "view_distance", lambda *a, **k: seen.append(a[3]) or real(*a, **k))
    codec, image = Codec.from_pretrained(name, device="cpu"), picture()
    codec.refine(image, codec.analyse(image), steps=1)
    about = model_info(name).objective
    assert (about["perceptual"] == "lpips-pair") == (times == 2)
    assert seen and {o.k_P for o in seen} == {times * about["k_P"]} and {o.k_M for o in seen} == {about["k_M"]}


def test_where_the_networks_are_left_out_bits_do_not_outweigh_what_is_left(codec):
    """The lambda of `hific-lite` was made for the LPIPS of two networks: beside the MSE alone it would empty the file."""
    image = sample_photo("coffee").crop((100, 50, 356, 242))
    first = plain(codec, image, 22)
    found = by_mse(codec, image, 22, 40)
    sizes = [len(codec.encode(latents)) for latents in (first, found)]
    assert 0.94 * sizes[0] < sizes[1] <= sizes[0]
    assert psnr(codec, image, found) > psnr(codec, image, first) + 0.5


def test_a_target_size_is_kept(no_lpips):
    codec, image = Codec.from_pretrained("hific-lite-base", device="cpu"), picture()
    for limit in (600, 900): assert len(codec.compress(image, max_bytes=limit, refine=6)) <= limit
    near, refined = (len(codec.compress(image, bpp=0.4, refine=n)) for n in (0, 6))
    assert 0.95 * near < refined <= near


@pytest.mark.parametrize("config", [
    ModelConfig(transform="light", channels=(8, 8, 8, 8), encoder_blocks=(0, 0, 0, 0), generator_blocks=(0, 0, 0, 0),
                n_residual_blocks=0, use_channel_norm=False, latent_channels=6, hyperprior_channels=6, likelihood=likelihood)
    for likelihood in ("gaussian", "mixture")], ids=lambda c: c.likelihood)
def test_models_of_one_rate_and_mixtures(config):
    torch.manual_seed(3)
    codec, image = Codec(Model(config), device="cpu", dtype=torch.float32), picture((96, 64))
    start = codec.quantize(codec.analyse(image))
    after = codec.refine(image, codec.analyse(image), steps=6, perceptual="none")
    data = codec.encode(after)
    assert len(data) <= len(codec.encode(start)) and np.array_equal(codec.decode_latents(data).symbols, after.symbols)
    assert psnr(codec, image, after) >= psnr(codec, image, start) - 0.01


def test_a_generator_that_is_trained_on_is_not_touched(codec):
    before = copy.deepcopy(codec.model.state_dict())
    by_mse(codec, picture((64, 64)), steps=2)
    assert all(torch.equal(t, before[name]) for name, t in codec.model.state_dict().items())
    assert not any(p.requires_grad for p in codec.model.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_off(codec, no_lpips, mode):
    expected = codec.compress(picture((64, 64)), refine=4)
    with mode(): assert codec.compress(picture((64, 64)), refine=4) == expected


@pytest.mark.parametrize("steps", [True, -1, 2.5, "many"])
def test_wrong_steps_are_named(codec, steps):
    with pytest.raises(CodecError, match="whole number"): codec.compress(picture((32, 32)), refine=steps)


def test_without_weights_it_says_so_before_any_work(tmp_path, monkeypatch, codec):
    refinement.get_distances.cache_clear()
    monkeypatch.setenv("HIFIC_LPIPS_WEIGHTS", str(tmp_path / "nowhere"))
    with pytest.raises(PerceptualError, match="HIFIC_LPIPS_WEIGHTS"): codec.compress(picture((64, 64)), refine=2)
    photos = tmp_path / "photos"
    photos.mkdir()
    picture((64, 64)).save(photos / "a.png")
    for workers in (1, 2):
        with pytest.raises(HificError, match="HIFIC_LPIPS_WEIGHTS"):
            run_bulk(photos, tmp_path / "out", BulkSettings(device="cpu", refine=2), workers=workers)
    assert not list((tmp_path / "out").glob("*.hfc"))
    assert main(["compress", str(photos / "a.png"), "--refine", "2", "--out", str(tmp_path / "a.hfc")]) == 1
    assert not (tmp_path / "a.hfc").exists()


def test_folders_the_command_line_pillow_and_an_evaluation(tmp_path, codec, weights, monkeypatch):
    "The same bytes on every way, for one thread."
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(3): picture((96 + 16 * i, 64)).save(photos / f"{i}.png")
    expected = {p.stem: codec.compress(p, quality="low", refine=3) for p in find_images(photos)}
    assert expected["1"] != codec.compress(photos / "1.png", quality="low")

    settings = BulkSettings(device="cpu", rate=dict(quality="low"), refine=3)
    assert run_bulk(photos, tmp_path / "out", settings, workers=2).done == 3
    assert {p.stem: p.read_bytes() for p in (tmp_path / "out").glob("*.hfc")} == expected
    with open(tmp_path / "out" / MANIFEST, newline="") as f: assert all("refine=3" in row["settings"] for row in csv.DictReader(f))
    again = run_bulk(photos, tmp_path / "out", BulkSettings(device="cpu", rate=dict(quality="low")), workers=1)
    assert again.failed == 3  # plain files would take their place

    assert main(["compress", str(photos / "1.png"), "--quality", "low", "--refine", "3", "--out", str(tmp_path / "1.hfc")]) == 0
    assert (tmp_path / "1.hfc").read_bytes() == expected["1"]
    Image.open(photos / "1.png").save(tmp_path / "p.hfc", quality="low", refine=3)
    assert (tmp_path / "p.hfc").read_bytes() == expected["1"]

    result = evaluate(photos, ["hific-lite", "hific-lite+refine3"], tmp_path / "run", metrics=["psnr"], workers=1,
                      qualities={"hific-lite": ["low"], "hific-lite+refine3": ["low"]})
    sizes = {(r["codec"], r["photo"]): r["bytes"] for r in result.records}
    label = next(c for c, _ in sizes if c.endswith("+refine3"))
    assert {p: sizes[label, p] for c, p in sizes if c == label} == {f"{k}.png": len(v) for k, v in expected.items()}


def test_the_job_refines(tmp_path, codec, weights):
    picture((96, 64)).save(tmp_path / "a.png")
    run = tmp_path / "run"
    assert run_job("compress", run, dict(input=str(tmp_path / "a.png"), quality="low", refine=3, device="cpu"))
    assert (run / "a.hfc").stat().st_size <= len(codec.compress(tmp_path / "a.png", quality="low"))
    assert (run / "a.hfc").read_bytes() != codec.compress(tmp_path / "a.png", quality="low")


def test_what_cannot_be_refined():
    with pytest.raises(EvaluationError, match="our own models"): find_contenders(["jpeg+refine3"])
    with pytest.raises(BulkError, match="originals"): BulkSettings(action="decompress", refine=3)
    with pytest.raises(BulkError, match="whole number"): BulkSettings(refine=-1)
    with pytest.raises(SystemExit): main(["compress", "x.png", "--refine", "-3"])
