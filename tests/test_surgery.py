"""Surgery: what is found, what takes its place, and what stays as it was."""

import copy
import io
import json
from collections import Counter
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models import metaformer, mobilevit, nfnet
from torch import nn
from torch.distributed.fsdp import fully_shard

from ditac_timm import DiTAC, SurgeryReport, audit_activations, replace_activations
from ditac_timm.matching import match
from ditac_timm.surgery import ROLES, NothingMatchedError, ScaledActivation

ALL = ("main", "glu", "se", "pos", "kernel")


def mlp(*activations: nn.Module) -> nn.Sequential:
    return nn.Sequential(*(module for act in activations for module in (nn.Linear(4, 4), act)))


def ditacs(model) -> dict[str, DiTAC]:
    return {path: module for path, module in model.named_modules() if isinstance(module, DiTAC)}


def thetas(report) -> dict[str, tuple]:
    return {path: fit.theta for path, fit in report.fits.items()}


def meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


# --- The report -------------------------------------------------------------------------------------------------------


def test_report():
    model = timm.create_model("mobilenetv3_small_100")
    report = replace_activations(model)
    assert isinstance(report, SurgeryReport)
    assert report.model == "MobileNetV3"
    assert Counter(report.replaced.values()) == {"Hardswish": 19, "ReLU": 5}
    assert report.replaced["bn1.act"] == "Hardswish"
    assert report.replaced.keys() == ditacs(model).keys() == report.roles.keys() == report.fits.keys()
    assert Counter(report.skipped.values()) == {"role se": 9, "role gate": 9}
    assert report.skipped["blocks.0.0.se.act1"] == "role se"
    assert report.settings == {"version": "ditac", "cells": 10, "domain": [-3.0, 3.0], "init": "match"}


@pytest.mark.parametrize("init", ["match", "identity"])
def test_report_is_json(init):
    report = replace_activations(mlp(nn.ReLU(), nn.Sigmoid()), init=init, version="ge")
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain == report.to_dict()
    assert plain["replaced"] == {"1": "ReLU"}
    assert plain["roles"] == {"1": "main"}
    assert plain["skipped"] == {"3": "role gate"}
    assert plain["settings"]["domain"] == [0.0, 3.0]
    assert plain["fits"].keys() == ({"1"} if init == "match" else set())


def test_report_prints_as_a_table():
    lines = str(replace_activations(timm.create_model("mobilenetv3_small_100"))).splitlines()
    assert lines[0].startswith("MobileNetV3: 24 activations replaced by DiTAC (version=ditac, cells=10")
    assert lines[1].split() == ["was", "role", "count", "rms", "error", "max", "error", "where"]
    assert lines[2].split()[:3] == ["Hardswish", "main", "19"]
    assert lines[3].split()[:3] == ["ReLU", "main", "5"]
    assert lines[4] == "18 left as they were"
    assert max(map(len, lines)) <= 120
    assert len({line.index("main") for line in lines[2:4]}) == 1, "columns are aligned"


# --- What is found ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("resnet18", {"main": 17}),
        ("mobilenetv3_small_100", {"main": 24, "se": 9, "gate": 9}),
        ("convnext_atto", {"main": 12}),
        ("eva02_tiny_patch14_224", {"glu": 12}),
        ("swinv2_tiny_window8_256", {"main": 12, "pos": 12}),
        ("mobilevitv2_050", {"main": 25, "kernel": 9}),
        ("efficientvit_b0", {"main": 24, "kernel": 4}),
        ("skresnet18", {"main": 25, "se": 8}),
        ("resnest14d", {"main": 15, "se": 4}),
        ("mambaout_femto", {"glu": 18, "main": 2}),
    ],
)
def test_roles(name, roles):
    """As a survey of timm, made without this package, counted them."""
    for role in ROLES:
        model = meta(name)
        if role in roles:
            report = replace_activations(model, roles=[role], init="identity")
            assert Counter(report.roles.values()) == {role: roles[role]}
        else:
            with pytest.raises(ValueError, match="No activation"):
                replace_activations(model, roles=[role])


def test_default_roles_are_main_and_glu():
    report = replace_activations(meta("mambaout_femto"))
    assert Counter(report.roles.values()) == {"glu": 18, "main": 2}
    assert set(replace_activations(meta("mobilenetv3_small_100")).roles.values()) == {"main"}


@pytest.mark.parametrize("types", [["Hardswish"], [nn.Hardswish], ["Hardswish", nn.Mish]])
def test_types(types):
    model = timm.create_model("mobilenetv3_small_100")
    report = replace_activations(model, types=types, init="identity")
    assert list(report.replaced.values()) == ["Hardswish"] * 19
    assert Counter(report.skipped.values())["type ReLU"] == 5
    assert sum(isinstance(module, nn.ReLU) for module in model.modules()) == 14


class Bump(nn.Module):
    """An activation that the package has never heard of."""

    def forward(self, x):
        return x * torch.exp(-x.square())


class Calm(nn.ReLU):
    """A subclass that computes something else."""

    def forward(self, x):
        return super().forward(x) + 1


class Renamed(nn.GELU):
    """A subclass that computes the same."""


@pytest.mark.parametrize("types", [["Bump"], [Bump]])
def test_types_may_name_an_unknown_class(types):
    model = mlp(Bump(), nn.ReLU())
    assert replace_activations(model, types=types).replaced == {"1": "Bump"}


def test_unknown_classes_stay():
    model = mlp(Bump(), Calm(), Renamed(), nn.ReLU())
    assert replace_activations(model).replaced == {"5": "Renamed", "7": "ReLU"}


def test_filter_fn():
    seen = []

    def in_the_first_stage(module, path):
        seen.append((path, type(module)))
        return path.startswith("layer1.")

    model = timm.create_model("resnet18")
    report = replace_activations(model, filter_fn=in_the_first_stage, init="identity")
    assert list(report.replaced) == [f"layer1.{block}.act{act}" for block in (0, 1) for act in (1, 2)]
    assert len(seen) == 17
    assert ("act1", nn.ReLU) in seen
    assert report.skipped["act1"] == "refused by filter_fn"


def test_norms_with_an_activation():
    """timm's BatchNormAct2d keeps its own `act`."""
    model = timm.create_model("test_efficientnet")
    report = replace_activations(model)
    assert isinstance(model.bn1.act, DiTAC)
    assert "bn1.act" in report.replaced


@pytest.mark.parametrize(
    "stays", [nn.Sigmoid(), nn.Hardsigmoid(), nn.Identity(), nn.Softmax(-1), nn.LogSoftmax(-1), nn.Dropout(0.1)]
)
def test_gates_identities_and_softmaxes_stay(stays):
    model = mlp(nn.ReLU(), stays)
    assert replace_activations(model).replaced == {"1": "ReLU"}
    assert model[3] is stays


def test_gates_are_replaced_where_named():
    model = mlp(nn.Sigmoid(), nn.Softmax(-1))
    assert replace_activations(model, roles=["gate"]).replaced == {"1": "Sigmoid"}
    assert isinstance(model[3], nn.Softmax)


@pytest.mark.parametrize("cls", [metaformer.StarReLU, metaformer.SquaredReLU])
def test_composed_activations_are_one_unit(cls):
    model = mlp(cls())
    assert replace_activations(model).replaced == {"1": cls.__name__}
    assert isinstance(model[1], DiTAC)


def test_caformer_has_no_old_activation_left():
    model = meta("caformer_s18")
    report = replace_activations(model)
    assert set(report.replaced.values()) >= {"StarReLU", "SquaredReLU"}
    assert not any(isinstance(module, nn.ReLU) for module in model.modules())


def test_twice_is_once():
    model = mlp(nn.ReLU(), nn.Sigmoid())
    replace_activations(model)
    new = model[1]
    with pytest.raises(ValueError, match="1 left: already DiTAC"):
        replace_activations(model)
    assert replace_activations(model, roles=["gate"]).skipped == {"1": "already DiTAC"}
    assert model[1] is new


# --- What takes its place ---------------------------------------------------------------------------------------------


def test_shared_instances_stay_shared():
    act = nn.ReLU()
    model = nn.ModuleDict({"a": mlp(act, nn.ReLU()), "b": nn.Sequential(act)})
    report = replace_activations(model)
    assert list(report.replaced) == ["a.1", "a.3", "b.0"]
    assert model["a"][1] is model["b"][0]
    assert model["a"][1] is not model["a"][3]


def test_one_instance_under_two_names():
    model = mlp(nn.ReLU())
    model.again = model[1]
    replace_activations(model)
    assert model.again is model[1]
    assert isinstance(model.again, DiTAC)


def test_a_module_that_holds_activations_may_be_shared():
    block = mlp(nn.ReLU())
    model = nn.ModuleList([block, block])
    replace_activations(model)
    assert isinstance(model[0][1], DiTAC)
    assert model[0] is model[1]
    assert len(list(model.parameters())) == 3


def test_coat_keeps_its_shared_layers():
    before, model = meta("coat_tiny"), meta("coat_tiny")
    replace_activations(model)

    def aliases(model):
        paths = {}
        for path, module in model.named_modules(remove_duplicate=False):
            paths.setdefault(id(module), []).append(path)
        return {tuple(names) for names in paths.values() if len(names) > 1}

    def without_parts(names):
        return {group for group in names if group[0].endswith(".act")}

    assert without_parts(aliases(model)) == without_parts(aliases(before))


def test_hooks_move_and_their_handles_still_remove_them():
    model = mlp(nn.ReLU())
    fired = []
    handles = [
        model[1].register_forward_pre_hook(lambda module, args: fired.append(("pre", module))),
        model[1].register_forward_hook(lambda module, args, output: fired.append(("forward", module))),
        model[1].register_forward_hook(
            lambda module, args, kwargs, output: fired.append(("kwargs", module)), with_kwargs=True
        ),
        model[1].register_full_backward_hook(lambda module, *_: fired.append(("backward", module))),
    ]
    replace_activations(model)
    new = model[1]
    assert isinstance(new, DiTAC)
    model(torch.randn(2, 4)).sum().backward()
    assert [name for name, _ in fired] == ["pre", "forward", "kwargs", "backward"]
    assert all(module is new for _, module in fired)
    fired.clear()
    for handle in handles:
        handle.remove()
    model(torch.randn(2, 4)).sum().backward()
    assert not fired


def test_hooks_do_not_fire_during_surgery():
    model, fired = mlp(nn.ReLU()), []
    model[1].register_forward_pre_hook(lambda *_: fired.append(1))
    model[1].register_forward_hook(lambda module, args, output: output + 1)
    report = replace_activations(model)
    assert not fired
    assert report.fits["1"] is match(nn.ReLU(), DiTAC()), "theta fits the activation, not what a hook makes of it"


def test_hooks_of_a_shared_instance_fire_at_each_call():
    act, fired = nn.ReLU(), []
    act.register_forward_hook(lambda *_: fired.append(1))
    model = mlp(act, act)
    replace_activations(model)
    model(torch.randn(2, 4))
    assert len(fired) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_the_neighbours(dtype):
    model = mlp(nn.SiLU()).to(dtype)
    replace_activations(model)
    assert model[1].theta.dtype == dtype
    assert model(torch.randn(2, 4).to(dtype)).dtype == dtype


def test_nearest_neighbour_counts():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.ReLU()), nn.ReLU())
    replace_activations(model)
    assert model[1][1].theta.dtype == torch.bfloat16
    assert model[2].theta.dtype == torch.float32


def test_device_is_the_neighbours():
    model = nn.Sequential(mlp(nn.ReLU()).to("meta"), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)))
    replace_activations(model)
    assert model[0][1].theta.device.type == "meta"
    assert model[1][0].theta.device.type == "cpu"


def test_no_neighbours_at_all():
    model = nn.Sequential(nn.ReLU())
    replace_activations(model)
    assert model[0].theta.device.type == "cpu"
    assert model[0].theta.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_training_flag(training):
    model = mlp(nn.ReLU(), nn.ReLU()).train(training)
    model[3].train(not training)
    replace_activations(model)
    assert (model[1].training, model[3].training) == (training, not training)


def test_the_gain_of_gamma_act_is_kept():
    old = nfnet.GammaAct("silu", gamma=1.7881293296813965)
    model = mlp(old)
    report = replace_activations(model)
    new = model[1]
    assert report.replaced == {"1": "GammaAct"}
    assert isinstance(new, ScaledActivation)
    assert report.fits["1"] is match(nn.SiLU(), DiTAC()), "the gain takes no part in the fit"
    x = torch.randn(1000)
    assert torch.equal(new(x), new.activation(x) * old.gamma)
    assert (new(x) - old(x)).abs().max() < 1.79 * (report.fits["1"].max + 1e-3)
    assert repr(new).startswith("ScaledActivation(\n  gain=1.788")


def test_nfnets_signal_keeps_its_variance():
    model = timm.create_model("test_nfnet").eval()
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        before = model.forward_features(x)
        replace_activations(model)
        after = model.forward_features(x)
    assert after.std().item() == pytest.approx(before.std().item(), rel=0.1)


def test_arguments_of_ditac():
    model = mlp(nn.ReLU(), nn.GELU())
    report = replace_activations(model, version="inf", cells=6, domain=(-2.0, 2.0), init="identity")
    for act in ditacs(model).values():
        assert (act.version, act.cells, act.domain) == ("inf", 6, (-2.0, 2.0))
        assert not act.theta.any()
    assert report.settings == {"version": "inf", "cells": 6, "domain": [-2.0, 2.0], "init": "identity"}


# --- Starting values --------------------------------------------------------------------------------------------------


def test_match_is_the_fit_of_each_class():
    model = mlp(nn.ReLU(), nn.Hardswish(), nn.ReLU())
    report = replace_activations(model)
    for path, old in (("1", nn.ReLU()), ("3", nn.Hardswish()), ("5", nn.ReLU())):
        assert report.fits[path] is match(old, DiTAC())
        torch.testing.assert_close(model[int(path)].theta, torch.tensor(report.fits[path].theta))


def test_identity_and_prior():
    identity, prior = mlp(nn.ReLU(), nn.ReLU()), mlp(nn.ReLU(), nn.ReLU())
    assert not replace_activations(identity, init="identity").fits
    assert not identity[1].theta.any()
    torch.manual_seed(0)
    assert not replace_activations(prior, init="prior").fits
    assert prior[1].theta.abs().min() > 0
    assert not torch.equal(prior[1].theta, prior[3].theta), "each is drawn for itself"


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto"])
def test_a_gelu_model_computes_what_it_computed(name):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=64) if "vit" in name else timm.create_model(name)
    model.eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        report = replace_activations(model)
        after = model(x)
    assert set(report.replaced.values()) == {"GELU"}
    assert (after - before).norm() < 1e-4 * before.norm()
    assert (after - before).abs().max() < 1e-4 * before.abs().max()


def test_a_model_built_on_meta_gets_the_fitted_thetas():
    model = meta("mobilenetv3_small_100")
    report = replace_activations(model)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for path, theta in thetas(report).items():
        torch.testing.assert_close(model.get_submodule(path).theta.detach(), torch.tensor(theta))


# --- Functional activations -------------------------------------------------------------------------------------------


def linear_attention(**kwargs):
    torch.manual_seed(0)
    return mobilevit.LinearSelfAttention(8, **kwargs).eval()


def test_linear_self_attention_is_timms_when_its_activation_is_a_relu():
    """Fails when timm changes what our subclass relies on. (Its cross-attention raises in timm too.)"""
    old = linear_attention()
    model = nn.Sequential(copy.deepcopy(old))
    report = replace_activations(model, roles=["kernel"])
    assert report.replaced == {"0.act": "relu"}
    new, x, called = model[0], torch.randn(2, 8, 4, 16), []
    new.act.register_forward_hook(lambda *_: called.append(1))
    assert not torch.equal(new(x), old(x))
    assert called == [1]
    new.act = nn.ReLU()
    assert torch.equal(new(x), old(x))


def test_linear_self_attention_uses_its_ditac_and_trains_it():
    model = nn.Sequential(linear_attention())
    replace_activations(model, roles=["kernel"], init="prior")
    model(torch.randn(2, 8, 4, 16)).sum().backward()
    assert model[0].act.theta.grad.abs().sum() > 0


def test_a_shared_linear_self_attention_changes_once():
    attention = linear_attention()
    report = replace_activations(nn.Sequential(attention, attention), roles=["kernel"])
    assert list(report.replaced) == ["0.act", "1.act"]
    assert isinstance(attention.act, DiTAC)


@pytest.mark.parametrize("way", ["compile", "export", "deepcopy", "pickle"])
def test_linear_self_attention_in_pytorchs_ways(way):
    model = nn.Sequential(linear_attention())
    replace_activations(model, roles=["kernel"], init="prior")
    x = torch.randn(2, 8, 4, 16)
    expected = model(x)
    if way == "compile":
        other = torch.compile(model, backend="aot_eager", fullgraph=True)
    elif way == "export":
        other = torch.export.export(model, (x,)).module()
    elif way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    torch.testing.assert_close(other(x), expected)


# --- Any module -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "counts", "left"),
    [
        (torchvision.models.resnet18, {"main": 9}, 0),
        (torchvision.models.mobilenet_v3_small, {"main": 24, "se": 9}, 0),
        (partial(torchvision.models.swin_t), {"main": 12}, 0),
    ],
)
def test_torchvision(build, counts, left):
    model = build(weights=None).eval()
    report = replace_activations(model, roles=ALL)
    assert Counter(report.roles.values()) == counts
    assert len(audit_activations(model, (3, 64, 64))) == left
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


@pytest.mark.parametrize("old", [nn.ReLU(), nn.GELU()])
def test_transformer_encoder_layer(old):
    """In eval PyTorch takes a fast path, which knows only ReLU and GELU: it must not pass DiTAC over."""
    model = nn.TransformerEncoderLayer(8, 2, 16, activation=old, batch_first=True).eval()
    report = replace_activations(model, init="prior")
    assert report.replaced == {"activation": type(old).__name__}
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(fast, model(x).detach())


def test_transformer_encoder_layer_with_a_function_has_no_module_to_replace():
    model = nn.TransformerEncoderLayer(8, 2, 16, activation=F.relu, batch_first=True)
    with pytest.raises(ValueError, match="it has none as modules"):
        replace_activations(model)


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"types": ["Mish"]},
            r"No activation of Sequential matched roles main, glu and types Mish \(1 left: type ReLU",
        ),
        ({"types": [nn.Mish]}, r"types Mish"),
        ({"roles": ("se",)}, r"matched roles se \(1 left: role main; 1 left: role gate\)"),
        ({"filter_fn": lambda *_: False}, "the filter"),
        ({"roles": ("main", "body")}, r"roles must be a sequence of main, glu, .*'body'"),
        ({"roles": "main"}, "roles must be a sequence of .* but is 'main'"),
        ({"types": "ReLU6"}, "types must be a sequence of classes or their names, but is 'ReLU6'"),
        ({"types": nn.ReLU}, "types must be a sequence of classes or their names, but is <class .*ReLU'>"),
        ({"init": "zeros"}, "init must be one of match, identity, prior, but is 'zeros'"),
        ({"version": "relu"}, "version must be one of ditac, ge, leaky, inf"),
        ({"cells": 1}, "cells must be at least 2"),
        ({"version": "ge", "domain": (-1.0, 1.0)}, "must begin at 0"),
    ],
)
def test_wrong_arguments(arguments, message):
    model = mlp(nn.ReLU(), nn.Sigmoid())
    before = [*model.modules()]
    with pytest.raises(ValueError, match=message) as error:
        replace_activations(model, **arguments)
    assert "\n" not in str(error.value)
    assert [*model.modules()] == before


@pytest.mark.parametrize(("odd", "name"), [(nn.GLU(), "GLU"), (nn.Linear(3, 3), "Linear")])
def test_a_named_class_that_is_no_function_of_one_number_leaves_the_model_whole(odd, name):
    model = nn.Sequential(nn.ReLU(), nn.Sequential(odd), nn.ReLU())
    before = [*model.modules()]
    with pytest.raises(ValueError, match=rf"^{name} at 1\.0 is no function of one number, leave it out") as error:
        replace_activations(model, types=["ReLU", name])
    assert "\n" not in str(error.value)
    assert [*model.modules()] == before


@pytest.mark.parametrize("stays", [nn.Identity(), nn.Dropout(0.1), nn.AlphaDropout(0.1)])
def test_identities_and_dropout_stay_where_named(stays):
    model, name = mlp(nn.ReLU(), stays), type(stays).__name__
    assert replace_activations(model, types=["ReLU", name]).skipped == {"3": f"{name} is no activation"}
    assert model[3] is stays
    with pytest.raises(NothingMatchedError, match=f"{name} is no activation"):
        replace_activations(model, types=[name])


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Sigmoid(), DiTAC()])
def test_an_activation_by_itself(model):
    with pytest.raises(ValueError, match="is itself an activation: give the module that holds it"):
        replace_activations(model)


@pytest.mark.parametrize("argument", ["device", "inplace", "cell", "role"])
def test_unknown_arguments(argument):
    with pytest.raises(TypeError, match=f"takes version, cells and domain for DiTAC, but not {argument}"):
        replace_activations(mlp(nn.ReLU()), **{argument: 1})


def test_a_model_without_activations():
    with pytest.raises(ValueError, match="it has none as modules"):
        replace_activations(nn.Linear(2, 2))


def distributed(model, tmp_path, wrap=nn.parallel.DistributedDataParallel):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        return wrap(model)
    finally:
        torch.distributed.destroy_process_group()


def sharded(model, tmp_path):
    mesh = partial(torch.distributed.device_mesh.init_device_mesh, "cpu", (1,))
    return distributed(model, tmp_path, lambda model: fully_shard(model, mesh=mesh()))


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (distributed, "before the model is wrapped: DistributedDataParallel"),
        (lambda model, _: nn.DataParallel(model), "before the model is wrapped: DataParallel"),
        (sharded, "before the model is wrapped: FSDPSequential"),
        (lambda model, _: torch.compile(model), "before torch.compile"),
        (lambda model, _: torch.jit.script(model), "before scripting or tracing"),
        (lambda model, _: torch.jit.trace(model, torch.zeros(1, 4)), "before scripting or tracing"),
        (lambda model, _: model.state_dict(), "must be a torch.nn.Module, but is a"),
    ],
    ids=["ddp", "dp", "fsdp2", "compile", "script", "trace", "no module"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_models_that_cannot_be_changed(wrap, message, tmp_path):
    model = mlp(nn.ReLU())
    wrapped = wrap(model, tmp_path)
    with pytest.raises(TypeError, match=message):
        replace_activations(wrapped)
    assert isinstance(model[1], nn.ReLU)
    if isinstance(wrapped, nn.Module):
        with pytest.raises(TypeError, match=f"{message}.* at 0"):
            replace_activations(nn.Sequential(wrapped, nn.ReLU()))


def test_a_module_compiled_in_place():
    """`module.compile()` keeps the class; whatever it holds, the change must show."""
    model = mlp(nn.ReLU())
    model.compile(backend="eager")
    x = torch.randn(8, 4)
    model(x)
    replace_activations(model, init="prior")
    torch.testing.assert_close(model(x), nn.Sequential(*model)(x))
