"""From pictures to a pipeline that loads: with so few steps that nothing is learned."""

import itertools
import json
import random
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sdcore import cli, embedded, images
from sdcore.embedded import checksums, reader, world

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from sdcore.embedded import evaluate, models, tokenizer, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedded")
    places = ["--out", str(folder / "models"), "--runs", str(folder / "runs")]
    few = ["--steps", "2", "--batch", "2", "--scenes", "8"]
    for model in ("autoencoder", "v1", "v1-ink", "v1-edge"):
        train.main([model, *places, *few])
    return folder


def test_a_model_loads_and_makes_a_picture(trained: Path) -> None:
    outline = world.outlines(world.scenes(1, 0)).expand(-1, 3, -1, -1)
    pictures = {}
    for name in ("v1", "v1-ink", "v1-edge"):
        pipe = embedded.load(name, folder=trained / "models")
        pipe.set_progress_bar_config(disable=True)
        options = {"image": outline} if name == "v1-edge" else {}
        pictures[name] = pipe(
            "a red circle left of a blue square",
            num_inference_steps=2,
            height=128,
            width=128,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
            **options,
        ).images
        assert pictures[name].shape == (1, 3, 128, 128)
        assert pictures[name].isfinite().all()
    assert not pictures["v1"].equal(pictures["v1-ink"])


def test_there_is_no_pickle(trained: Path) -> None:
    kinds = {path.suffix for path in trained.rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json", ".txt", ".csv", ""}
    assert {path.name for path in trained.rglob("*") if path.is_file() and not path.suffix} == {
        checksums.NAME
    }


@pytest.mark.parametrize("harm", ["damaged", "missing", "does not belong", "no SHA256SUMS"])
def test_a_folder_that_is_not_as_it_was_is_refused(
    trained: Path, tmp_path: Path, harm: str
) -> None:
    import shutil

    folder = tmp_path / "models"
    shutil.copytree(trained / "models" / "v1", folder / "v1")
    weights = folder / "v1" / "unet" / "diffusion_pytorch_model.safetensors"
    if harm == "damaged":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif harm == "missing":
        weights.unlink()
    elif harm == "does not belong":
        (folder / "v1" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    else:
        (folder / "v1" / checksums.NAME).unlink()
    with pytest.raises(ValueError, match=harm.replace("no SHA", "has no SHA")):
        embedded.load("v1", folder=folder)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(
        ValueError, match="name must be one of v1, v2, v1-ink, v1-edge, xl; got 'v3'"
    ):
        embedded.load("v3")


def test_v1_draws_what_it_is_asked() -> None:
    """The one that comes with the package. Of 500 pictures of two things 484 were right."""
    right = 0
    for things in (1, 2):
        scenes = world.scenes(6, 5, things=things, held_out=True)
        prompts = [world.caption(one) for one in scenes]
        drawn = evaluate.generate(embedded.load("v1"), prompts, 0)
        readings = reader.read(drawn)
        right += sum(reader.judge(*pair).all_right for pair in zip(readings, scenes, strict=True))
    assert right >= 10


def test_generate_writes_pictures_that_a_seed_repeats(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    model = str(trained / "models" / "v1")
    common = ["generate", "--prompt", "a red circle", "--steps", "2", "--model", model, "--quiet"]
    common += ["--device", "cpu"]
    assert cli.main([*common, "--output", "a.png", "--seed", "4"]) == 0
    assert cli.main([*common, "--output", "b.png", "--seed", "3", "--count", "2"]) == 0
    one, first, second = (images.read(Path(f"{name}.png")) for name in ("a", "b-1", "b-2"))
    assert one.shape == (128, 128, 3)
    assert one.equal(second) and not one.equal(first)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "model, complaint",
    [
        ("embedded:v9", "name must be one of v1"),
        ("embedded:v1-edge", "v1-edge can't make this picture"),
        ("nowhere/at-all", "nowhere/at-all"),
    ],
)
def test_generate_says_what_is_wrong_in_one_line(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    model: str,
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(embedded, "FOLDER", trained / "models")
    asked = ["generate", "--prompt", "x", "--model", model, "--quiet", "--device", "cpu"]
    assert cli.main(asked) == 2
    error = capsys.readouterr().err
    assert error.startswith("sdcore generate: error: ") and complaint in error
    assert not Path("generated.png").exists()


def test_color_writes_a_picture_a_figure_and_a_report(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    asked = ["color", "--prompt", "a red circle", "--steps", "3", "--inner", "2"]
    asked += ["--model", str(trained / "models" / "v1"), "--device", "cpu"]
    assert cli.main([*asked, "--palette", "#000000,#102030:2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (guided,) = report["sliced_w1"]["guided"]
    assert guided < report["sliced_w1"]["without"]
    # By other directions.
    assert report["distances"] == [pytest.approx(guided, rel=0.1)]
    assert [len(one) for one in report["losses"]] == [2, 2, 2]
    assert report["pictures"] == ["color.png"]
    dark = images.read(Path("color.png"))
    figure = images.read(Path(report["figure"]))
    assert dark.shape == (128, 128, 3)
    assert figure.shape[1] > figure.shape[0] > 500
    reference = torch.rand(16, 24, 3, generator=torch.Generator().manual_seed(0))
    images.write(images.quantize(reference), Path("photo.png"))
    more = ["--reference", "photo.png", "--output", "light.png", "--no-figure", "--quiet"]
    assert cli.main([*asked, *more, "--preset", "fast", "--batch", "2"]) == 0
    assert capsys.readouterr().out == ""
    first, second = (images.read(Path(f"light-{number}.png")) for number in (1, 2))
    assert not first.equal(dark)
    assert not first.equal(second)


def test_color_takes_models_whose_scheduler_does_not_follow(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(trained / "models" / "v1")
    pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "model")
    asked = ["color", "--prompt", "a red circle", "--steps", "2", "--inner", "1", "--no-figure"]
    asked += ["--model", "model", "--palette", "#000,#fff", "--device", "cpu"]
    assert cli.main(asked) == 0
    assert "DDIM steps in the place of PNDMScheduler" in capsys.readouterr().out
    assert images.read(Path("color.png")).shape == (128, 128, 3)


@pytest.mark.parametrize(
    ("what", "complaint"),
    [
        (["--palette", "#000000:x"], "a weight is a number; got 'x' for '#000000'"),
        (["--palette", "#zzz"], "'#zzz'"),
        (["--reference", "nowhere.png"], "nowhere.png"),
        (["--reference", "."], "."),
        (["--palette", "#fff", "--output", "x.bmpp"], "x.bmpp"),
    ],
)
def test_color_says_what_is_wrong_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    what: list[str],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["color", "--prompt", "a red circle", "--device", "cpu", *what]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sdcore color: error: ") and complaint in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_regions_writes_a_picture_and_a_figure(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    model = str(trained / "models" / "v1")
    asked = ["--prompt", "a red circle left of a blue square", "--steps", "2", "--model", model]
    asked += ["--device", "cpu", "--quiet"]
    images.write(images.quantize(torch.eye(128)[..., None].expand(-1, -1, 3)), Path("mask.png"))
    regions = ["--region", "a red circle: 0,0,0.5,1", "--region", "blue square: mask.png"]
    assert cli.main(["regions", *asked, *regions, "--base", "0"]) == 0
    assert capsys.readouterr().out == ""
    assert cli.main(["generate", *asked, "--output", "plain.png"]) == 0
    assert cli.main(["regions", *asked, *regions, "--alone", "0.4", "--output", "alone.png"]) == 0
    assert not images.read(Path("alone.png")).equal(images.read(Path("regions.png")))
    found, plain = images.read(Path("regions.png")), images.read(Path("plain.png"))
    assert found.shape == plain.shape == (128, 128, 3)
    assert not found.equal(plain)
    figure = images.read(Path("regions-figure.png"))
    assert figure.shape[1] > 2.5 * figure.shape[0]  # three panels
    # The diagonal is drawn as where its phrase was attended to.
    assert figure.unique(dim=0).shape[0] > 50


@pytest.mark.parametrize(
    "region, complaint",
    [
        ("a red circle", "a region is 'PHRASE: left,top,right,bottom'"),
        ("a red circle: 0,0,1", "a box is left,top,right,bottom"),
        ("a red circle: 0,0,2,1", "box must be"),
        ("a red circle: nowhere.png", "nowhere.png"),
        ("a star: 0,0,1,1", "the phrase 'a star' is not in the prompt"),
    ],
)
def test_regions_says_what_is_wrong_in_one_line(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    region: str,
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["regions", "--prompt", "a red circle", "--region", region, "--quiet"]
    asked += ["--model", str(trained / "models" / "v1"), "--device", "cpu"]
    assert cli.main(asked) == 2
    error = capsys.readouterr().err
    assert error.startswith("sdcore regions: error: ") and complaint in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_delta_writes_a_picture_and_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    common = ["--prompt", "a red circle", "--steps", "2", "--device", "cpu", "--quiet"]
    assert cli.main(["generate", *common, "--model", "embedded:v2", "--output", "plain.png"]) == 0
    asked = ["delta", *common]
    assert cli.main([*asked, "--strength", "0", "--output", "none.png"]) == 0
    assert cli.main([*asked, "--grid"]) == 0
    drawn = images.quantize((torch.eye(128) > 0.5).float()[..., None].expand(-1, -1, 3))
    images.write(drawn, Path("outline.png"))
    control = ["--adapted", "embedded:v1-edge", "--image", "outline.png"]
    assert cli.main([*asked, *control, "--output", "edge.png"]) == 0
    model = ["--adapted", "embedded:v2", "--source", "embedded:v2", "--output", "same.png"]
    assert cli.main([*asked, *model]) == 0
    assert capsys.readouterr().out == ""
    plain, none, found, edge, same = (
        images.read(Path(f"{name}.png")) for name in ("plain", "none", "delta", "edge", "same")
    )
    assert none.equal(plain) and same.equal(plain)
    assert not found.equal(plain) and not edge.equal(plain) and not edge.equal(found)
    figure = images.read(Path("delta-grid.png"))
    assert figure.shape[1] > 4 * figure.shape[0]  # six panels


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--adapted", "embedded:v1-edge"], "is a ControlNet, which needs --image FILE"),
        (["--adapted", "embedded:v9"], "there is no such embedded model"),
        (["--adapted", "nowhere/at-all"], "nowhere/at-all"),
        (["--source", "embedded:v2"], "the LoRA does not fit the source: unet."),
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--grid", "delta.png"], "--grid delta.png would replace an image"),
    ],
)
def test_delta_says_what_is_wrong_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = ["delta", "--prompt", "a red circle", "--device", "cpu", "--quiet", *arguments]
    assert cli.main(asked) == 2
    error = capsys.readouterr().err
    assert error.startswith("sdcore delta: error: ") and complaint in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


class Toy(nn.Module):
    """With a convolution, of which the layout in memory changes for training."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 3)
        with torch.no_grad():
            for number, p in enumerate(self.parameters()):
                p.copy_(0.1 * (number + 1) + 0.01 * torch.arange(p.numel()).view_as(p))

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) + torch.randn(2, 1, 1, device=x.device) - 1).square().mean()


def fit(
    run: Path, stop: int | None, device: str = "cpu", steps: int = 20, until: float | None = None
) -> dict[str, Tensor]:
    run.mkdir(exist_ok=True)
    toy, calls = Toy(), itertools.count()

    def batch_of(generator: torch.Generator, size: int) -> tuple[Tensor, ...]:
        if next(calls) == stop:
            raise KeyboardInterrupt
        return (torch.randn(size, 3, 5, 5, generator=generator, device=device),)

    accelerator = Accelerator(cpu=device == "cpu")
    train.fit(toy, batch_of, train.Plan(steps, 4, 0.1, 0), accelerator, run, 1, until)
    return {name: p.detach().clone() for name, p in toy.named_parameters()}


def test_the_loss_weighs_clean_latents() -> None:
    """Whatever the UNet predicts: the same error of the clean latents, the same loss."""

    class Wrong(nn.Module):
        """Off by a tenth in the clean latents, of which it is told."""

        def __init__(self, prediction: str, clean: Tensor, alphas: Tensor) -> None:
            super().__init__()
            self.prediction, self.clean, self.alphas = prediction, clean, alphas

        def forward(self, noisy: Tensor, steps: Tensor, *_: object) -> object:
            alpha = self.alphas[steps][:, None, None, None]
            clean = self.clean + 0.1
            noise = (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
            velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
            found = noise if self.prediction == "epsilon" else velocity
            return types.SimpleNamespace(sample=found)

    class Text(nn.Module):
        def forward(self, tokens: Tensor) -> object:
            return types.SimpleNamespace(last_hidden_state=tokens[..., None].float())

    clean = torch.randn(64, 4, 8, 8)
    losses = []
    for name in ("v1", "v2"):
        scheduler = models.scheduler(name)
        alphas = scheduler.alphas_cumprod
        unet = Wrong(scheduler.config.prediction_type, clean, alphas)
        loss = train.DenoisingLoss(unet, [Text()], scheduler)
        torch.manual_seed(0)
        tokens, sides = torch.zeros(64, 3, dtype=torch.long), torch.full((64,), 128)
        losses.append(loss(clean, tokens, torch.empty(0), sides))
        torch.manual_seed(0)
        torch.randn_like(clean)
        ratios = alphas / (1 - alphas)
        weights = ratios[loss._timesteps(64)].clamp(max=train.SNR_BOUND).sqrt()
        torch.testing.assert_close(losses[-1], 0.01 * weights.mean(), rtol=1e-3, atol=0)
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)


@pytest.fixture
def accelerate_forgets() -> Iterator[None]:
    """Accelerate keeps the first device that a process asked it for."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("accelerate_forgets")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_run_that_was_cut_off_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", -1)
    whole = fit(tmp_path / "whole", None, device)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", 9, device)
    again = fit(tmp_path / "cut", None, device)
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-6)
    assert not whole["layer.weight"].equal(Toy().to(device).layer.weight)


@pytest.mark.usefixtures("accelerate_forgets")
def test_a_run_takes_as_many_steps_as_end_in_time(tmp_path: Path) -> None:
    start = time.monotonic()
    fit(tmp_path / "run", None, steps=10**6, until=start + 3)
    assert time.monotonic() - start < 10
    last = (tmp_path / "run" / "metrics.csv").read_text().split()[-1].split(",")
    assert 300 <= int(last[0]) < 10**5


@pytest.mark.parametrize("planned", [1000, 10**6])
def test_a_pace_settles_early(planned: int) -> None:
    pace, now, done, steps = train.Pace(1000.0), 60.0, 0, planned
    settled = []
    while done < steps:
        now += 20 if done == 0 else 2  # the first hundred compile
        done += 100
        steps = pace.steps(done, steps, now)
        if now > 400:
            settled.append(steps)
    assert set(settled) == {steps}
    assert 990 <= now <= 1010


@pytest.mark.gpu
@pytest.mark.usefixtures("accelerate_forgets")
def test_captured_steps_do_what_plain_ones_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = fit(tmp_path / "captured", None, "cuda")
    monkeypatch.setattr(train, "EAGER_STEPS", 100)
    plain = fit(tmp_path / "plain", None, "cuda")
    for name, value in plain.items():
        torch.testing.assert_close(captured[name], value, rtol=1e-5, atol=1e-6)
    losses = [(tmp_path / run / "metrics.csv").read_text() for run in ("captured", "plain")]
    assert losses[0].split(",")[3] == losses[1].split(",")[3]


def test_each_word_of_the_world_is_a_token(trained: Path) -> None:
    from transformers import CLIPTokenizer

    words = CLIPTokenizer.from_pretrained(trained / "models" / "v1" / "tokenizer")
    rng = random.Random(5)
    for one in world.scenes(300, 5) + world.scenes(50, 5, style="ink"):
        text = world.caption(one, rng)
        tokens = words.tokenize(text)
        plain = text.replace(",", " ,").replace("-", " - ").split()
        assert tokens == [f"{word}</w>" for word in plain]
        assert len(tokens) + 2 <= tokenizer.LENGTH
    assert words.unk_token_id not in words("Zyklop №7 …", add_special_tokens=False).input_ids
    assert models.kept_vocabulary().get_vocab() == words.get_vocab()


def test_the_models_are_small() -> None:
    with torch.device("meta"):
        v1 = models.unet("v1")
        parts = [v1, models.controlnet(v1), models.unet("v2"), models.unet("xl")]
        parts += [models.autoencoder(name) for name in ("v1", "v2", "xl")]
    assert 2 * models.parameters(*parts) < 24e6
