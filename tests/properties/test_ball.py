"""Claims about the ball as the network sees it: in every precision, whatever wraps the network."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dat_ds import attacks
from dat_ds.attacks import NORMS, SampleGenerator, ThreatModel
from dat_ds.casting import LayerCasts, casting_at_layers
from dat_ds.errors import ConfigError, ModelError
from dat_ds.models import PixelModel
from tests.distributed import tiny
from tests.distributed.harness import allow_fp16

EPS = {"linf": 8 / 255, "l2": 0.5, "l1": 3.0}
ORDERS = {"linf": math.inf, "l2": 2, "l1": 1}
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


# ---- networks whose first operation looks at what it is given


class Spy(nn.Module):
    """The first operation of a network; keeps the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return x.clone()


def layers(*first: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *first,
        nn.Conv2d(3, 4, 3, stride=2),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, tiny.CLASSES),
    )


class Own(nn.Module):
    """Normalises by itself, with buffers, before its first layer; another adds float32 inside."""

    def __init__(self, body: nn.Module | None = None) -> None:
        super().__init__()
        self.spy = Spy()
        self.register_buffer("mean", torch.tensor(MEAN).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, -1, 1, 1))
        self.register_buffer("shift", torch.linspace(0, 1, tiny.CLASSES))
        self.body = layers() if body is None else body
        self.head = nn.Linear(tiny.CLASSES, tiny.CLASSES)
        self.scale = nn.Parameter(torch.ones(tiny.CLASSES))  # of the model itself, beside layers

    def forward(self, x: Tensor) -> Tensor:
        x = (self.spy(x) - self.mean) / self.std
        return self.head(self.body(x) * self.scale + self.shift)


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.body, self.reentrant = body, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


class Holder(nn.Module):
    """Holds a network by some name and calls it, as DDP and PEFT do."""

    def __init__(self, name: str, held: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, held)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return getattr(self, self.name)(*args, **kwargs)


def pixel_model() -> PixelModel:
    model = PixelModel(layers(), num_classes=tiny.CLASSES, mean=MEAN, std=STD)
    model.normalize = nn.Sequential(Spy(), model.normalize)  # type: ignore[assignment]
    return model


WRAPPERS: dict[str, Callable[[], nn.Module]] = {
    "PixelModel": pixel_model,
    "own": Own,
    "Sequential": lambda: layers(Spy()),
    "around a PixelModel": lambda: Holder("backbone", pixel_model()),
    "DDP-like": lambda: Holder("module", Own()),
    "PEFT-like": lambda: Holder("base_model", Holder("model", Own())),
    "checkpointed": lambda: Own(Checkpointed(layers(), False)),
    "checkpointed, reentrant": lambda: Own(Checkpointed(layers(), True)),
    "compiled": lambda: torch.compile(Own(), backend="eager"),
    "compiled PixelModel": lambda: torch.compile(pixel_model(), backend="eager"),
}


def spy_of(model: nn.Module) -> Spy:
    (spy,) = (m for m in model.modules() if isinstance(m, Spy))
    return spy


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook of ours is there; DeepSpeed leaves one of its own."""
    return any("_cast_to_weights" in repr(hook) for hook in module._forward_pre_hooks.values())


def images(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Half of the pixels lie near 1, where rounding to 16 bits moves them most."""
    x, y = tiny.images(4)
    return torch.cat([x[:2], 1 - 0.02 * x[2:]]).to(dtype), y


def lengths(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    delta = (x_adv.double() - x.double()).flatten(1)
    return torch.linalg.vector_norm(delta, ord=ORDERS[norm], dim=1)


def furthest(norm: str, numel: int = 3 * tiny.SIZE**2) -> float:
    """Eps, and what rounding of every float32 pixel in [1/2, 1) adds at most."""
    return EPS[norm] * (1 + 1e-7) + 2**-25 * numel ** (1 / ORDERS[norm])


def assert_in_ball(seen: list[Tensor], x: Tensor, norm: str) -> None:
    for pixels in seen:
        assert pixels.dtype == torch.float32
        assert lengths(pixels, x, norm).max() <= furthest(norm)


def test_rounding_to_16_bits_would_be_noticed() -> None:
    x, _ = images()
    for norm in NORMS:
        for dtype in HALF.values():
            assert lengths(x.to(dtype), x, norm).max() > furthest(norm) - EPS[norm]


# ---- engines


def engine_of(model: nn.Module, precision: str, stage: int, norm: str = "linf", **dat: Any) -> Any:
    import dat_ds

    allow_fp16()
    sections = {**tiny.PRECISIONS[precision]}
    if precision == "fp16":
        sections["fp16"] = {"enabled": True, "initial_scale_power": 8}
    attack = {"name": "pgd", "steps": 2, "step_size": EPS[norm]}
    sections["dat"] = {
        "threat_model": {"norm": norm, "eps": EPS[norm]},
        "attack": attack,
        **dat,
    }
    return dat_ds.initialize(model=model, config=tiny.config(stage, **sections))[0]


@pytest.fixture
def engines() -> Iterator[Callable[..., Any]]:
    made: list[Any] = []

    def make(*args: Any, **dat: Any) -> Any:
        made.append(engine_of(*args, **dat))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


STAGES = {"float32": (0,), "bf16": (0, 2, 3), "fp16": (0, 3), "autocast": (0,)}
CASES = [
    (wrapper, precision, stage)
    for wrapper in WRAPPERS
    for precision, stages in STAGES.items()
    for stage in stages
    if not wrapper.startswith("compiled") or (precision, stage) == ("bf16", 0)
]


@pytest.mark.parametrize(("wrapper", "precision", "stage"), CASES)
def test_the_network_sees_float32_pixels_of_the_ball(
    engines: Callable[..., Any], wrapper: str, precision: str, stage: int
) -> None:
    norm = NORMS[(list(WRAPPERS).index(wrapper) + stage) % len(NORMS)]
    model = WRAPPERS[wrapper]()
    engine = engines(model, precision, stage, norm)
    spy, (x, y) = spy_of(model), images()
    loss = engine(x, y)
    attacked, trained = spy.seen[:-1], spy.seen[-1:]
    assert len(attacked) == 2
    assert_in_ball(attacked, x, norm)
    assert_in_ball(trained, x, norm)
    assert lengths(trained[0], x, norm).max() > 0.5 * EPS[norm], "the attack does move pixels"
    engine.backward(loss)
    engine.step()
    assert loss.isfinite()
    spy.seen.clear()
    with engine.frozen() as frozen, torch.no_grad():
        frozen(x)
    assert len(spy.seen) == 1
    assert torch.equal(spy.seen[0], x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", NORMS)
def test_the_ball_is_around_the_image_that_the_engine_is_given(
    engines: Callable[..., Any], norm: str, dtype: torch.dtype
) -> None:
    model = Own()
    engine = engines(model, "bf16", 0, norm)
    x, y = images(dtype)
    engine(x, y)
    assert_in_ball(spy_of(model).seen, x.float(), norm)


@pytest.mark.parametrize("stage", [0, 3])
def test_both_images_of_an_objective_arrive_in_float32(
    engines: Callable[..., Any], stage: int
) -> None:
    model = Own()
    engine = engines(model, "bf16", stage, objective={"name": "trades", "beta": 6.0})
    x, y = images()
    engine(x, y)
    both = spy_of(model).seen[-1]
    assert len(both) == 2 * len(x)
    assert any(torch.equal(half, x) for half in both.chunk(2))
    for half in both.chunk(2):
        assert_in_ball([half], x, "linf")


def test_the_attack_compiled_by_the_engine_sees_float32(
    engines: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = Own()
    engine = engines(model, "bf16", 0, engine={"compile": "attack"})
    x, y = images()
    engine(x, y)
    assert_in_ball(spy_of(model).seen, x, "linf")


def test_a_compiled_model_under_zero_3_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"stage=3 with a model that torch\.compile has wrapped"):
        engine_of(Holder("module", torch.compile(Own(), backend="eager")), "bf16", 3)


def test_a_pixel_model_is_left_alone(engines: Callable[..., Any]) -> None:
    model = pixel_model()
    engines(model, "bf16", 0)
    assert not any(is_hooked(m) for m in model.modules())


def test_a_pixel_model_with_float32_inside_has_its_layers_cast(
    engines: Callable[..., Any],
) -> None:
    torch.manual_seed(0)
    model = PixelModel(Own(), num_classes=tiny.CLASSES, mean=(0.0,) * 3, std=(1.0,) * 3)
    loss = engines(model, "bf16", 0)(*images())
    assert loss.isfinite()


@pytest.mark.parametrize("stage", [0, 3])
def test_nothing_is_left_of_a_closed_engine(stage: int) -> None:
    model = Own()
    names = set(model.state_dict())
    engine = engine_of(model, "bf16", stage)
    engine(*images())
    assert set(engine.module.state_dict()) == names
    assert is_hooked(model.head)
    assert all(b.dtype == torch.float32 for b in model.buffers()), "constants keep all their digits"
    engine.close()
    assert not any(is_hooked(m) for m in model.modules())


def test_the_start_of_training_is_compared_with_itself(engines: Callable[..., Any]) -> None:
    engine = engines(Own(), "bf16", 0, "linf", objective={"name": "fare"}, attack={"steps": 1})
    x, _ = images()
    with engine.frozen() as frozen, torch.no_grad():
        now = frozen(x)
    assert torch.equal(engine._original_outputs(x), now)


# ---- what a layer is


def test_a_layer_casts_floats_wider_than_its_weights_and_nothing_else() -> None:
    embed, lstm = nn.Embedding(4, 4).bfloat16(), nn.LSTM(4, 4).bfloat16()
    attend = nn.MultiheadAttention(4, 1, bias=False).bfloat16()
    wide = torch.rand(2, 3, 4)
    for model in (embed, lstm, attend):
        LayerCasts(model)
    assert embed(torch.tensor([1])).dtype == torch.bfloat16
    out, _ = lstm(wide, (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)))
    assert out.dtype == torch.bfloat16
    out, _ = attend(query=wide, key=wide, value=wide)
    assert out.dtype == torch.bfloat16
    plain = nn.Linear(4, 4)
    LayerCasts(plain)
    assert not is_hooked(plain), "float32 weights"


def test_weights_behind_a_parametrization_count() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1, bias=False)).bfloat16()
    with casting_at_layers(layer):
        assert layer(torch.rand(1, 3, 2, 2)).dtype == torch.bfloat16
    assert not is_hooked(layer)


def test_casting_equals_a_cast_of_the_input_bit_for_bit() -> None:
    model = layers().bfloat16()
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    cast = model(x.bfloat16())
    (of_cast,) = torch.autograd.grad(cast.sum(), x)
    with casting_at_layers(model), casting_at_layers(model):
        hooked = model(x)
        (of_hooked,) = torch.autograd.grad(hooked.sum(), x)
    assert torch.equal(hooked, cast)
    assert torch.equal(of_hooked, of_cast)


def test_layers_of_other_libraries_cast_too() -> None:
    from timm.layers import Conv2dSame, StdConv2d

    for kind in (StdConv2d, Conv2dSame):
        layer = kind(3, 4, 3).bfloat16()
        with casting_at_layers(layer):
            assert layer(torch.rand(1, 3, 8, 8)).dtype == torch.bfloat16


# ---- operations of a model's own


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.head = nn.Linear(144, tiny.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.conv2d((x - 0.5) / 0.25, self.weight).flatten(1))


class NormalisingConv(nn.Conv2d):
    """Its input must not be cast, for its first operation is not a product with its weights."""

    def __init__(self) -> None:
        super().__init__(3, tiny.CLASSES, 8)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - 0.5) / 0.25).flatten(1)


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(192, tiny.CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight


@pytest.mark.parametrize("kind", [Functional, NormalisingConv, ByHand])
@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("attack", ["pgd", "none"])
def test_weights_with_float32_pixels_are_refused_in_one_line(
    engines: Callable[..., Any], kind: type[nn.Module], precision: str, attack: str
) -> None:
    section = {"name": "none"} if attack == "none" else {"steps": 1, "step_size": 0.01}
    engine = engines(kind(), precision, 0, attack=section)
    with pytest.raises(ConfigError) as error:
        engine(*images())
    message = str(error.value)
    assert "\n" not in message
    assert f"{kind.__name__} has {str(HALF[precision]).removeprefix('torch.')} weights" in message
    assert "(test_ball.py, line " in message
    assert "x = ((x - mean) / std).to(self.weight.dtype)" in message
    assert '"torch_autocast": {"enabled": true' in message


@pytest.mark.parametrize("kind", [Functional, NormalisingConv, ByHand])
def test_the_advice_works(engines: Callable[..., Any], kind: type[nn.Module]) -> None:
    assert engines(kind(), "autocast", 0)(*images()).isfinite()


class Wrong(nn.Module):
    def __init__(self, message: str) -> None:
        super().__init__()
        self.head, self.message = nn.Linear(192, tiny.CLASSES), message

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError(self.message)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory",
        "\"cholesky_cpu\" not implemented for 'BFloat16'; input type",
    ],
)
def test_other_errors_of_a_model_stay_what_they_are(
    engines: Callable[..., Any], message: str
) -> None:
    with pytest.raises(RuntimeError) as error:
        engines(Wrong(message), "bf16", 0)(*images())
    assert str(error.value) == message


def test_a_shape_that_a_model_cannot_take_is_named(engines: Callable[..., Any]) -> None:
    message = "mat1 and mat2 shapes cannot be multiplied (4x12 and 192x4)"
    with pytest.raises(ModelError) as error:
        engines(Wrong(message), "bf16", 0)(*images())
    assert f"images of shape (4, 3, 8, 8), torch.float32: {message}" in str(error.value)


# ---- the pure functions

STEPS = {"steps": 2}
FUNCTIONS: dict[str, tuple[tuple[str, ...], Callable[[float], dict[str, Any]]]] = {
    "pgd": (NORMS, lambda eps: {"step_size": eps, **STEPS}),
    "mim": (("linf", "l2"), lambda eps: {"step_size": eps, **STEPS}),
    "apgd": (NORMS, lambda eps: STEPS),
    "fat": (NORMS, lambda eps: {"step_size": eps, **STEPS}),
    "fgsm": (("linf", "l2"), lambda eps: {}),
    "fgsm_rs": (("linf", "l2"), lambda eps: {}),
    "n_fgsm": (("linf",), lambda eps: {"noise_scale": 0.0}),
}
MODULES = {
    "zero_grad": (("linf",), lambda eps: {}),
    "guided": (("linf",), lambda eps: {}),
    "fgsm_pgi": (("linf", "l2"), lambda eps: {}),
}


def function_of(name: str) -> Callable[..., Tensor]:
    found: Callable[..., Tensor]
    if name in MODULES:
        module = __import__(f"dat_ds.attacks.{name}", fromlist=[name])
        found = getattr(module, name)
    else:
        found = getattr(attacks, name)
    return found


def model_for(dtype: torch.dtype) -> nn.Module:
    """In float32, and in float64 for images in that."""
    return layers().to(torch.promote_types(dtype, torch.float32))


PURE = [
    pytest.param(name, norm, dtype, id=f"{name}-{norm}-{str(dtype)[6:]}")
    for name, (norms, _) in {**FUNCTIONS, **MODULES}.items()
    for norm in norms
    for dtype in (torch.float32, torch.float64, *HALF.values())
]


@pytest.mark.parametrize(("name", "norm", "dtype"), PURE)
def test_functions_stay_in_the_ball_of_any_image(name: str, norm: str, dtype: torch.dtype) -> None:
    x, y = images(dtype)
    threat = ThreatModel(norm, EPS[norm])  # type: ignore[arg-type]
    _, options = {**FUNCTIONS, **MODULES}[name]
    keys = {"threat": threat, "generator": SampleGenerator(0, 0, 0), **options(EPS[norm])}
    x_adv = function_of(name)(model_for(dtype), x, y, **keys)
    assert x_adv.dtype == torch.promote_types(dtype, torch.float32)
    assert lengths(x_adv, x.float(), norm).max() <= furthest(norm)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("wrapper", ["PixelModel", "own", "Sequential", "DDP-like"])
def test_functions_run_16_bit_networks_on_float32_pixels(
    wrapper: str, norm: str, dtype: torch.dtype
) -> None:
    model, (x, y) = WRAPPERS[wrapper]().to(dtype), images()
    threat = ThreatModel(norm, EPS[norm])  # type: ignore[arg-type]
    x_adv = attacks.pgd(
        model, x, y, threat=threat, generator=SampleGenerator(0, 0, 0), steps=2, step_size=EPS[norm]
    )
    assert_in_ball([*spy_of(model).seen, x_adv], x, norm)
    assert not any(is_hooked(m) for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, *HALF.values()], ids=str)
def test_several_norms_leave_each_image_in_one_of_their_balls(dtype: torch.dtype) -> None:
    x, y = images(dtype)
    x_adv = attacks.multi_norm(
        layers(),
        x,
        y,
        threat=ThreatModel("linf", EPS["linf"]),
        other_norms={"l2": EPS["l2"]},
        step_size=EPS["linf"],
        generator=SampleGenerator(0, 0, 0),
        steps=2,
    )
    assert x_adv.dtype == torch.float32
    within = [lengths(x_adv, x, norm) <= furthest(norm) for norm in ("linf", "l2")]
    assert bool((within[0] | within[1]).all())
