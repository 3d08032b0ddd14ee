from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import sdcore
from sdcore.ops import delta_combine
from sdcore.ops.delta_combine import reference
from sdcore.ops.layouts import joint
from tests.platforms import Platform, assert_as_good, platforms

ALL = platforms("reference", "cpp", "triton")
PLAIN = [p for p in ALL if p.id.endswith("reference")]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TYPES = ("epsilon", "v_prediction", "sample")
OUTPUTS = ("prediction", "x0", "next")
LEGS = ("target", "source", "adapted")
LEVELS = {"alpha": (0.8, 0.3), "sigma": (0.6, 0.95), "next_alpha": (0.9, 0.5)}
LEVELS["next_sigma"] = (0.4, 0.8)


def supported(platform: Platform, dtype: torch.dtype) -> bool:
    return platform.backend != "triton" or dtype != torch.float64


def some(shape: tuple[int, ...], seed: int, branches: int = 2) -> dict[str, Any]:
    """Predictions and samples of two branches, in float64, of numbers that every dtype holds."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(rows: int) -> Tensor:
        size = (rows, *shape[1:])
        return torch.randint(-31, 32, size, generator=generator).double() / 16

    found: dict[str, Any] = {leg: drawn(branches * shape[0]) for leg in LEGS}
    return found | {"sample": drawn(shape[0]), "source_sample": drawn(shape[0])}


def levels(rows: int, each: bool) -> dict[str, Tensor]:
    """One for each sample, or one for all."""
    return {
        name: torch.tensor(pair, dtype=torch.float64).repeat(rows)[:rows] if each
        else torch.tensor(pair[0], dtype=torch.float64)
        for name, pair in LEVELS.items()
    }  # fmt: skip


def specified(given: dict[str, Any]) -> Tensor:
    """The specification in the dtype of ``given``, which has all that the op may be told."""
    given = dict(given)
    sample = given["sample"]
    pairs = []
    for leg in LEGS:
        one = given[leg]
        if isinstance(one, Tensor):
            one = one.split(len(sample)) if len(one) > len(sample) else (None, one)
        pairs.append((None, None) if one is None else (one[1], one[0]))
    numbers = {}
    for name in ("alpha", "sigma", "next_alpha", "next_sigma", "strength", "guidance_scale"):
        one = given.get(name, 1.0 if name == "strength" else None)
        if one is not None:
            one = torch.as_tensor(one, dtype=sample.dtype).reshape(-1, *(1,) * (sample.ndim - 1))
        numbers[name] = one
    types = given.get("prediction_type", "epsilon")
    types = (types,) * 3 if isinstance(types, str) else types
    scale_t, scale_s = given.get("scales", (1.0, 1.0))
    return reference(
        *pairs, sample, given.get("source_sample", sample), (numbers["alpha"], numbers["sigma"]),
        (numbers["next_alpha"], numbers["next_sigma"]), numbers["strength"] * scale_t / scale_s,
        types, numbers["guidance_scale"], given.get("guidance_rescale", 0.0),
        given.get("output", "prediction"),
    )  # fmt: skip


def cast(given: dict[str, Any], dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """Levels stay in float32 at least, as samplers hold them."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def one(name: str, value: Any) -> Any:
        if isinstance(value, (tuple, list)) and name in LEGS:
            return tuple(one(name, part) for part in value)
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if name in LEGS or "sample" in name else wide)

    return {name: one(name, value) for name, value in given.items()}


def slack_of(exact: Tensor) -> float:
    """Of few, plain PyTorch may round none, and terms cancel in all."""
    return 8 if exact.numel() < 8 else 1


def agrees(platform: Platform, given: dict[str, Any], dtype: torch.dtype) -> Tensor:
    low = cast(given, dtype)
    low64 = cast(low, torch.float64)
    exact, plain = specified(low64), specified(low)
    with platform.forced():
        ours = delta_combine(**cast(low, dtype, platform.device))
    assert ours.dtype == dtype
    assert_as_good(ours, plain, exact, dtype, slack_of(exact))
    return ours


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "apart"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("platform", ALL)
def test_agrees_with_the_specification(
    platform: Platform, dtype: torch.dtype, guided: bool, output: str
) -> None:
    if not supported(platform, dtype):
        pytest.skip("not supported there")
    for number, types in enumerate(itertools.product(TYPES, repeat=3)):
        given = some((2, 4, 5, 7), number) | levels(2, each=number % 2 == 0)
        given |= {"prediction_type": types, "output": output, "strength": 0.7}
        given |= {"scales": (0.25, 0.125)}
        if guided:
            given["guidance_scale"] = 4.0
        agrees(platform, given, dtype)


@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 1, 1), (3, 5), (1, 4, 33, 31), (2, 3, 2, 9, 8)])
@pytest.mark.parametrize("platform", ALL)
def test_shapes(platform: Platform, shape: tuple[int, ...]) -> None:
    rows = shape[0]
    strengths = torch.linspace(-1, 2, rows, dtype=torch.float64)
    for output, scale in itertools.product(OUTPUTS, (None, 3.0)):
        given = some(shape, 1) | levels(rows, each=True) | {"output": output}
        given |= {"strength": strengths, "guidance_scale": scale, "prediction_type": TYPES}
        agrees(platform, given, torch.float32)


@pytest.mark.parametrize("platform", ALL)
def test_more_values_than_a_block(platform: Platform) -> None:
    """In several programs and tasks, and with the larger block of many values."""
    shapes = [(2, 4, 48, 50)]
    if platform.device == "cuda" or platform.backend == "cpp":
        shapes += [(1, 4, 300, 301), (6, 16, 130, 127)]
    for shape in shapes:
        given = some(shape, 2) | levels(shape[0], each=True)
        given |= {"guidance_scale": 2.0, "output": "next"}
        agrees(platform, given, torch.float32)


@pytest.mark.parametrize("platform", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("output", OUTPUTS)
def test_guidance_of_each_sample_rescaled(
    platform: Platform, dtype: torch.dtype, output: str
) -> None:
    for shape in ((3, 4, 9, 8), (2, 4, 50, 49), (1, 2)):
        given = some(shape, 3) | levels(shape[0], each=True)
        given |= {
            "prediction_type": ("v_prediction", "epsilon", "epsilon"),
            "guidance_scale": torch.linspace(1.5, 7, shape[0], dtype=torch.float64),
            "guidance_rescale": 0.7, "output": output,
        }  # fmt: skip
        agrees(platform, given, dtype)


@pytest.mark.parametrize("platform", ALL)
def test_without_a_delta_it_is_guidance_and_a_step(platform: Platform) -> None:
    given = some((2, 4, 6, 6), 4) | levels(2, each=False)
    given |= {"source": None, "adapted": None, "guidance_scale": 5.0, "output": "next"}
    agrees(platform, given, torch.float32)
    given |= {"guidance_scale": None, "output": "x0", "prediction_type": "v_prediction"}
    agrees(platform, given, torch.float32)


@pytest.mark.parametrize("platform", ALL)
@pytest.mark.parametrize("types", [("epsilon",) * 3, ("v_prediction", "epsilon", "sample")])
def test_delta_of_the_conditional_branch_alone(platform: Platform, types: tuple[str, ...]) -> None:
    for scale in (None, 3.0):
        given = some((2, 4, 6, 6), 5) | levels(2, each=True)
        given |= {leg: (None, given[leg][2:]) for leg in ("source", "adapted")}
        given |= {"prediction_type": types, "guidance_scale": scale}
        ours = agrees(platform, given, torch.float32)
        if scale is None:  # the unconditional one is the target's
            assert torch.equal(ours[:2].cpu(), given["target"][:2].float())


@pytest.mark.parametrize("platform", ALL)
def test_pairs_are_what_one_tensor_is(platform: Platform) -> None:
    given = cast(some((2, 4, 6, 6), 6) | levels(2, each=True), torch.float32, platform.device)
    given |= {"guidance_scale": 3.0, "output": "next"}
    pairs = given | {leg: given[leg].split(2) for leg in LEGS}
    one = given | {leg: given[leg][2:] for leg in LEGS}  # of one branch
    with platform.forced():
        assert torch.equal(delta_combine(**given), delta_combine(**pairs))
        whole = delta_combine(**given | {"guidance_scale": None})
        alone = delta_combine(**one | {"guidance_scale": None})
        # Code for one branch may add and multiply at once where that for two does not.
        torch.testing.assert_close(whole[2:], alone, rtol=1e-6, atol=1e-6)


def laid_out(tensor: Tensor, how: str) -> Tensor:
    """The same values, lying otherwise."""
    if how == "channels last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if how == "cropped":
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), math.nan).to(tensor)
        wide[..., 1:-2] = tensor
        return wide[..., 1:-2]
    if how == "transposed":
        return tensor.mT.contiguous().mT
    if how == "every other":
        return torch.stack([tensor, torch.full_like(tensor, math.nan)], 1).flatten(0, 1)[::2]
    return tensor


LAYOUTS = ("contiguous", "channels last", "cropped", "transposed", "every other")


@pytest.mark.parametrize("platform", ALL)
@pytest.mark.parametrize(
    "how",
    [
        *((one, one) for one in LAYOUTS),
        ("channels last", "contiguous"),
        ("contiguous", "channels last"),
        ("transposed", "cropped"),
    ],
)
def test_any_layout(platform: Platform, how: tuple[str, str]) -> None:
    """Of the target and of all others: value and gradients are those of contiguous ones."""
    given = cast(some((2, 3, 6, 5), 7) | levels(2, each=True), torch.float32, platform.device)
    options = {"guidance_scale": 3.0, "output": "prediction", "strength": 0.5}
    options |= {"prediction_type": ("v_prediction", "epsilon", "sample")}
    names = (*LEGS, "sample", "source_sample")
    results = []
    for layouts in (how, ("contiguous", "contiguous")):
        inputs = {
            name: laid_out(given[name], layouts[name != "target"]).detach().requires_grad_()
            for name in names
        }
        with platform.forced():
            out = delta_combine(**given | inputs | options)
            weights = torch.arange(out.numel(), dtype=out.dtype, device=out.device)
            (out * weights.view(out.shape)).sum().backward()
        results.append([out, *(inputs[name].grad for name in names if name != "sample")])
        if layouts[0] == "channels last":
            assert out.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_joined_axes() -> None:
    flat, last = torch.empty(2, 4, 5, 7), torch.empty(2, 5, 7, 4).permute(0, 3, 1, 2)
    assert joint([flat, flat]) == joint([last, None, last]) == ()
    assert joint([flat, last]) == ((35, 4), (1, 35), (4, 1))
    assert joint([last, None, flat]) == ((4, 35), (1, 4), (0, 0), (35, 1))
    assert joint([flat.mT, flat.mT]) == ()
    assert joint([torch.empty(2, 1, 1)]) == ()
    assert joint([flat[..., 1:3]]) == ((20, 2), (7, 1))


def gradients(function: Any, given: dict[str, Any], grad: Tensor, names: list[str]) -> list[Tensor]:
    inputs = {name: given[name].detach().requires_grad_() for name in names}
    out = function(given | inputs)
    return list(torch.autograd.grad(out, inputs.values(), grad.to(out), allow_unused=True))


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "apart"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("platform", ALL)
def test_gradients_to_predictions_and_samples(
    platform: Platform, dtype: torch.dtype, guided: bool, output: str
) -> None:
    if not supported(platform, dtype):
        pytest.skip("not supported there")
    names = [*LEGS, "sample", "source_sample"]
    for number, types in enumerate(itertools.product(TYPES, repeat=3)):
        given = some((2, 4, 5, 7), number) | levels(2, each=number % 2 == 0)
        given |= {"prediction_type": types, "output": output, "strength": 0.7}
        if guided:
            given["guidance_scale"] = 4.0
        rows = 2 if guided else 4
        grad = torch.randint(-8, 9, (rows, 4, 5, 7)).double() / 8
        low = cast(given, dtype)
        exact = gradients(specified, cast(low, torch.float64), grad, names)
        plain = gradients(specified, low, grad, names)
        with platform.forced():
            there = cast(low, dtype, platform.device)
            ours = gradients(lambda some: delta_combine(**some), there, grad, names)
        for one, other, right in zip(ours, plain, exact, strict=True):
            if right is None:
                assert one is None or not one.any()
            else:
                assert one.dtype == dtype
                assert_as_good(one, other, right, dtype, slack_of(right))


@pytest.mark.parametrize("platform", ALL)
def test_gradient_of_what_needs_one(platform: Platform) -> None:
    given = cast(some((2, 4, 6, 6), 8) | levels(2, each=True), torch.float32, platform.device)
    given |= {"output": "next", "guidance_scale": 3.0}
    names = [*LEGS, "sample"]

    def value(some: dict[str, Any]) -> Tensor:
        return delta_combine(**some)

    with platform.forced():
        grad = torch.ones(2, 4, 6, 6)
        together = gradients(value, given, grad, names)
        for name, wanted in zip(names, together, strict=True):
            assert torch.equal(gradients(value, given, grad, [name])[0], wanted)


@pytest.mark.parametrize("platform", PLAIN)
def test_gradcheck(platform: Platform) -> None:
    given = cast(some((2, 2, 2), 9) | levels(2, each=True), torch.float64, platform.device)
    given |= {"strength": torch.tensor([0.5, 1.5], dtype=torch.float64, device=platform.device)}
    given |= {"guidance_scale": torch.tensor(3.0, dtype=torch.float64, device=platform.device)}
    linear = [*LEGS, "sample", "source_sample"]
    scalars = [*LEVELS, "strength", "guidance_scale"]
    with platform.forced():
        for output, types, rescale, names in itertools.product(
            OUTPUTS,
            (("epsilon", "epsilon", "v_prediction"), ("v_prediction", "sample", "epsilon")),
            (0.0, 0.4),
            (linear, linear + scalars),
        ):
            options = {"output": output, "prediction_type": types, "guidance_rescale": rescale}

            def value(*inputs: Tensor, options: Any = options, names: Any = names) -> Tensor:
                named = dict(zip(names, inputs, strict=True))
                return delta_combine(**given | named | options)

            inputs = [given[name].clone().requires_grad_() for name in names]
            assert torch.autograd.gradcheck(value, inputs)


@pytest.mark.parametrize("platform", ALL)
def test_a_second_derivative_raises(platform: Platform) -> None:
    given = cast(some((2, 2, 2), 10), torch.float32, platform.device)
    target = given["target"].requires_grad_()
    grad = torch.ones_like(target).requires_grad_()
    with platform.forced():
        out = delta_combine(target, given["source"], given["adapted"])
        (first,) = torch.autograd.grad(out, target, grad, create_graph=True)
        with pytest.raises(RuntimeError, match="delta_combine has no second derivative"):
            first.sum().backward()


@pytest.mark.parametrize("platform", ALL)
@pytest.mark.parametrize("kind", TYPES)
def test_without_strength_or_difference_the_target_stays(platform: Platform, kind: str) -> None:
    """Bit for bit, whatever the three predict."""
    given = some((2, 4, 6, 7), 11) | levels(2, each=True)
    given = {name: one * 1.1 if "sample" in name or name in LEGS else one
             for name, one in given.items()}  # fmt: skip
    for dtype in (torch.float16, torch.float32):
        there = cast(given, dtype, platform.device)
        with platform.forced():
            for types in itertools.product(TYPES, repeat=2):
                same = delta_combine(**there | {"strength": 0.0, "prediction_type": (kind, *types)})
                assert torch.equal(same, there["target"])
                none = torch.zeros(2, device=platform.device)
                same = delta_combine(
                    **there | {"strength": none, "prediction_type": (kind, *types)}
                )
                assert torch.equal(same, there["target"])
                same = delta_combine(
                    **there | {"source": there["adapted"], "strength": 1.7,
                               "prediction_type": (kind, types[0], types[0])}
                )  # fmt: skip
                assert torch.equal(same, there["target"])


@pytest.mark.parametrize("platform", ALL)
def test_a_level_without_signal(platform: Platform) -> None:
    """Zero terminal SNR: what predicts v knows its clean latents where alpha is 0."""
    given = some((2, 4, 6, 7), 12) | {"prediction_type": "v_prediction", "output": "next"}
    given |= {"alpha": torch.tensor(0.0), "sigma": torch.tensor(1.0), "guidance_scale": 2.0}
    given |= {"next_alpha": torch.tensor(0.1), "next_sigma": torch.tensor(0.99)}
    assert agrees(platform, given, torch.float32).isfinite().all()
    given |= {"prediction_type": "epsilon", "output": "prediction"}
    assert agrees(platform, given, torch.float32).isfinite().all()


def released(given: dict[str, Any]) -> Tensor:
    """As the published code has it: clean latents after guidance, in the autoencoder's units."""
    scale_t, scale_s = given["scales"]
    a, s = given["alpha"], given["sigma"]
    n = (a * a + s * s).sqrt()

    def clean(leg: str, kind: str, x: Tensor) -> Tensor:
        u, c = given[leg].chunk(2)
        p = u + given["guidance_scale"] * (c - u)
        if kind == "sample":
            return p
        return (x - s * p) / a if kind == "epsilon" else a / n**2 * x - s / n * p

    kinds = given["prediction_type"]
    t = clean("target", kinds[0], given["sample"]) / scale_t
    s0, a0 = (
        clean(leg, kind, given["source_sample"]) / scale_s
        for leg, kind in zip(LEGS[1:], kinds[1:], strict=True)
    )
    return (t + given["strength"] * (a0 - s0)) * scale_t


def test_is_the_released_formulation() -> None:
    """For all types, latent scales, and samples of exploding variance."""
    for alpha, types in itertools.product((0.6, 1.0), itertools.product(TYPES, repeat=3)):
        given = some((2, 4, 6, 7), 13) | {"guidance_scale": 4.0, "strength": 1.3}
        given |= {"alpha": torch.tensor(alpha), "sigma": torch.tensor(0.8)}
        given |= {"prediction_type": types, "scales": (0.13025, 0.18215)}
        ours = delta_combine(**given, output="x0")
        torch.testing.assert_close(ours, released(given), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_steps_as_diffusers_does(name: str, kind: str) -> None:
    import diffusers

    options = {"prediction_type": kind}
    if name == "DDIMScheduler":
        options |= {"clip_sample": False, "set_alpha_to_one": False}
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(10)
    given = cast(some((2, 4, 6, 7), 14, branches=1), torch.float32)
    for index in (0, 4, 8):
        t = scheduler.timesteps[index]
        if name == "DDIMScheduler":
            products = scheduler.alphas_cumprod[[int(t), int(scheduler.timesteps[index + 1])]]
            (alpha, next_alpha), (sigma, next_sigma) = products.sqrt(), (1 - products).sqrt()
        else:
            alpha = next_alpha = 1.0
            sigma, next_sigma = scheduler.sigmas[index : index + 2]
            scheduler._step_index = index
        wanted = scheduler.step(given["target"], t, given["sample"]).prev_sample
        ours = delta_combine(
            given["target"], sample=given["sample"], alpha=alpha, sigma=sigma,
            next_alpha=next_alpha, next_sigma=next_sigma, prediction_type=kind, output="next",
        )  # fmt: skip
        torch.testing.assert_close(ours, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("platform", ALL)
def test_nan_stays_where_it_is(platform: Platform) -> None:
    given = cast(some((2, 4, 6, 7), 15) | levels(2, each=True), torch.float32, platform.device)
    given["source"][0, 0, 0, 0] = math.nan
    with platform.forced():
        out = delta_combine(**given, guidance_scale=3.0, output="next")
    assert out.isnan().sum() == 1 and out[0, 0, 0, 0].isnan()


@pytest.mark.parametrize("platform", ALL)
def test_dtypes_are_mixed(platform: Platform) -> None:
    """A sample in float32 and predictions in half precision; the result is the sample's."""
    given = cast(some((2, 4, 6, 7), 16) | levels(2, each=True), torch.float32, platform.device)
    given |= {"guidance_scale": 3.0}
    half = given | {leg: given[leg].half() for leg in LEGS}
    half |= {"alpha": given["alpha"].half().float()}
    same = given | {"alpha": half["alpha"]}
    with platform.forced():
        assert torch.equal(
            delta_combine(**half, output="next"), delta_combine(**same, output="next")
        )
        assert delta_combine(**half).dtype == torch.float16


@pytest.mark.parametrize("platform", ALL)
def test_nothing_is_no_error(platform: Platform) -> None:
    for shape in ((0, 4, 6, 7), (2, 0, 6, 7)):
        given = cast(some(shape, 17) | levels(max(1, shape[0]), each=False), torch.float32)
        given = cast(given, torch.float32, platform.device)
        given = {name: one.requires_grad_() if name in LEGS else one for name, one in given.items()}
        with platform.forced():
            out = delta_combine(**given, output="next", guidance_scale=2.0)
            out.sum().backward()
        assert out.shape == shape and given["target"].grad.shape == given["target"].shape


def test_opcheck() -> None:
    given = cast(some((2, 2, 3), 18) | levels(2, each=True), torch.float32)
    parts = [one for leg in LEGS for one in (given[leg][2:], given[leg][:2])]
    samples = [given["sample"], given["source_sample"]]
    tensors = [one.clone().requires_grad_() for one in (*parts, *samples)]
    scalars = [*(given[name] for name in LEVELS), torch.ones(2), None]
    for guided, output in itertools.product((True, False), range(3)):
        rest = [1.0, 3.0, 0.0, [0, 1, 2], guided, output]
        torch.library.opcheck(torch.ops.sdcore.delta_combine, [*tensors, *scalars, *rest])
    grad = torch.randn(2, 2, 3)
    torch.library.opcheck(
        torch.ops.sdcore.delta_combine_backward,
        [grad, *(one.detach() for one in tensors), *scalars, 1.0, 3.0, [0, 1, 2], True, 2,
         [True] * 7 + [False]],
    )  # fmt: skip


@pytest.mark.parametrize("platform", ALL)
def test_compiles_without_a_break(platform: Platform) -> None:
    if platform.backend == "triton" and platform.device == "cpu":
        pytest.skip("the interpreter runs Python")
    given = cast(some((2, 4, 6, 7), 19) | levels(2, each=True), torch.float32, platform.device)
    last = {leg: given[leg].contiguous(memory_format=torch.channels_last) for leg in LEGS}
    options = {"guidance_scale": 3.0, "prediction_type": TYPES, "scales": (0.2, 0.1)}

    def value(**inputs: Tensor) -> Tensor:
        return delta_combine(**inputs, **options, output="next") * 2

    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    with platform.forced():
        for inputs in (given, given | last):
            inputs = {
                name: one.clone().requires_grad_() if name in LEGS else one
                for name, one in inputs.items()
            }
            ours, wanted = compiled(**inputs), value(**inputs)
            assert torch.equal(ours, wanted) and ours.stride() == wanted.stride()
            found = [torch.autograd.grad(one.sum(), inputs["adapted"]) for one in (ours, wanted)]
            assert torch.equal(found[0][0], found[1][0])


@pytest.mark.gpu
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_nothing_waits_and_graphs_replay(rescale: float) -> None:
    """With new values in the same places, and another timestep's level."""
    given = cast(some((2, 4, 64, 64), 20) | levels(2, each=True), torch.float16, "cuda")
    options = {"guidance_scale": 3.0, "output": "next", "guidance_rescale": rescale}
    options |= {"prediction_type": ("v_prediction", "epsilon", "epsilon")}
    delta_combine(**given, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        delta_combine(**given, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = delta_combine(**given, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, one in (some((2, 4, 64, 64), 21) | levels(2, each=True)).items():
        given[name].copy_(one.roll(1, 0))
    graph.replay()
    assert torch.equal(out, delta_combine(**given, **options))


@pytest.mark.gpu
def test_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests have empty memory filled, in a launch of its own.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    given = cast(some((1, 4, 128, 128), 22) | levels(1, each=True), torch.float16, "cuda")
    names = [*LEGS, "sample"]
    inputs = {name: given[name].requires_grad_() for name in names}
    pairs = {leg: given[leg].detach().split(1) for leg in LEGS}
    pairs = {leg: tuple(one.requires_grad_() for one in pair) for leg, pair in pairs.items()}
    options = {"guidance_scale": 3.0, "output": "next"}
    grad = torch.ones_like(given["sample"])

    def launches(work: Any) -> list[str]:
        for _ in range(2):
            work()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            work()
            torch.cuda.synchronize()
        cuda = torch.autograd.DeviceType.CUDA
        return [one.name for one in profile.events() if one.device_type == cuda]

    assert launches(lambda: delta_combine(**given | options)) == ["_combine"]
    out = delta_combine(**given | pairs | options)
    leaves = [inputs["sample"], *(one for pair in pairs.values() for one in pair)]
    back = launches(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))
    assert back == ["_combine_backward"]
    rescaled = options | {"guidance_rescale": 0.5}
    with torch.no_grad():
        assert launches(lambda: delta_combine(**given | rescaled)) == ["_sums", "_combine"]


BAD = [
    ({"target": 3}, TypeError, "target must be a tensor"),
    ({"target": (None, None)}, TypeError, "target must be a tensor"),
    ({"source": (None, 3)}, TypeError, "source must be a tensor"),
    ({"target": torch.zeros(())}, ValueError, "target must be .batch, ….; got a tensor without"),
    ({"sample": torch.zeros(())}, ValueError, "sample must be .batch, ….; got a tensor without"),
    ({"source": None}, ValueError, "source and adapted come together"),
    ({"target": torch.zeros(4, 4, 6, 6)}, ValueError, "source must have the shape of a branch"),
    ({"source": torch.zeros(4, 3, 6, 7)}, ValueError, "source must have the shape"),
    ({"adapted": torch.zeros(2, 4, 6, 7)}, ValueError, "must have the same branches"),
    ({"target": torch.zeros(2, 4, 6, 7)}, ValueError, "source has an unconditional branch"),
    ({"target": torch.zeros(4, 4, 6, 7).int()}, ValueError, "must be of float16"),
    ({"source": torch.zeros(4, 4, 6, 7).double()}, ValueError, "float64 is not mixed"),
    ({"sample": torch.zeros(2, 4, 6, 7, device="meta")}, ValueError, "sample must be on target's"),
    ({"sample": 3}, TypeError, "sample must be a tensor"),
    ({"prediction_type": "flow"}, ValueError, "prediction_type must be one of epsilon"),
    ({"prediction_type": ("epsilon", "sample")}, ValueError, "or three of them"),
    ({"output": "mean"}, ValueError, "output must be one of prediction, x0, next; got 'mean'"),
    ({"output": "next", "next_alpha": None}, ValueError, "next_alpha is needed"),
    ({"output": "x0", "sample": None}, ValueError, "sample is needed"),
    ({"alpha": None, "prediction_type": TYPES}, ValueError, "alpha is needed"),
    ({"alpha": torch.zeros(3)}, ValueError, "alpha must be one number or one for each of 2"),
    ({"sigma": torch.zeros(2).int()}, TypeError, "sigma must hold floats"),
    ({"strength": torch.zeros(3)}, ValueError, "strength must be one number or one for each"),
    ({"guidance_scale": torch.zeros(2, device="meta")}, ValueError, "guidance_scale must be on"),
    ({"guidance_rescale": 0.5, "guidance_scale": None}, ValueError, "needs a guidance_scale"),
    ({"guidance_rescale": 1.5}, ValueError, "guidance_rescale must be from 0 to 1"),
    ({"scales": (0.0, 1.0)}, ValueError, "scales must be two numbers above 0"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = cast(some((2, 4, 6, 7), 23) | levels(2, each=True), torch.float32)
    given |= {"guidance_scale": 3.0, "output": "next"}
    delta_combine(**given)
    with pytest.raises(error, match=message):
        delta_combine(**given | change)


def test_states_that_need_to_be_given() -> None:
    given = cast(some((2, 4, 6, 7), 24) | levels(2, each=True), torch.float32)
    given |= {"prediction_type": ("epsilon", "epsilon", "v_prediction"), "source_sample": None}
    delta_combine(**given)
    with pytest.raises(ValueError, match="source_sample is needed"):
        delta_combine(**given, scales=(0.13, 0.18))
    with pytest.raises(ValueError, match="sample is needed"):
        delta_combine(**given | {"sample": None})
    alone = {leg: given[leg][:2] for leg in LEGS}
    with pytest.raises(ValueError, match="guidance_scale needs both branches"):
        delta_combine(**given | alone, guidance_scale=3.0)


@pytest.mark.gpu
def test_float64_on_a_gpu_takes_plain_pytorch() -> None:
    given = cast(some((2, 4, 6, 7), 25) | levels(2, each=True), torch.float64, "cuda")
    ours = delta_combine(**given, output="next", guidance_scale=2.0)
    wanted = specified(cast(given, torch.float64) | {"output": "next", "guidance_scale": 2.0})
    torch.testing.assert_close(ours.cpu(), wanted)
    with sdcore.backend("triton"), pytest.raises(sdcore.backends.BackendError, match="no float64"):
        delta_combine(**given)
