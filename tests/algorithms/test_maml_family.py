"""ANIL, BOIL, Meta-SGD, MAML++ and ProtoMAML, against finite differences, an independent implementation and by hand."""

from dataclasses import replace

import higher
import pytest
import torch
import torch.nn.functional as F
from conftest import SmoothNet, random_tasks
from torch import nn

from metacv.algorithms.gradient.anil import ANIL
from metacv.algorithms.gradient.boil import BOIL
from metacv.algorithms.gradient.inner_loop import key
from metacv.algorithms.gradient.maml import MAML
from metacv.algorithms.gradient.mamlpp import MAMLPlusPlus
from metacv.algorithms.gradient.meta_sgd import MetaSGD
from metacv.algorithms.gradient.protomaml import ProtoMAML
from metacv.algorithms.metric.protonet import ProtoNet
from metacv.backbones.batch_norm import batch_norms
from metacv.backbones.conv4 import Conv4
from metacv.model import parameters_of

STEPS = {"inner_lr": 0.1, "inner_steps": 3, "eval_inner_steps": 3}


def make(cls=MAML, backbone=None, **settings):
    """A method in float64 whose parameters, learned rates among them, all differ."""
    torch.manual_seed(0)
    algorithm = cls(backbone or SmoothNet(), way=3, **STEPS | settings).double()
    for rates in algorithm.rates.values() if hasattr(algorithm, "rates") else ():
        rates.data += 0.05 * torch.rand_like(rates)
    return algorithm.train()


def step_gradient(algorithm, tasks) -> torch.Tensor:
    algorithm.zero_grad()
    algorithm.training_step(tasks)
    return torch.cat([p.grad.flatten() for p in algorithm.parameters() if p.requires_grad])


FAMILY = [
    (ANIL, {}),
    (BOIL, {}),
    (MetaSGD, {}),
    (ProtoMAML, {"inner_lr": 0.01}),
    (MAMLPlusPlus, {}),
    (MAMLPlusPlus, {"multi_step_loss_steps": 10}),
    (MAMLPlusPlus, {"per_step_norm": False, "multi_step_loss_steps": 10}),
]


@pytest.mark.parametrize(("cls", "settings"), FAMILY)
def test_outer_gradient_equals_finite_differences(cls, settings):
    algorithm, tasks = make(cls, **settings), random_tasks(dtype=torch.float64)
    parameters = [p for p in algorithm.parameters() if p.requires_grad]
    gradient = step_gradient(algorithm, tasks)
    start = nn.utils.parameters_to_vector(parameters).detach()

    def loss(at: float, direction: torch.Tensor) -> float:
        nn.utils.vector_to_parameters(start + at * direction, parameters)
        algorithm.done = 0  # MAML++ counts outer steps
        return float(algorithm.training_step(tasks)["loss"])

    generator = torch.Generator().manual_seed(1)
    random = torch.randn(gradient.shape, generator=generator).double()
    for direction in (F.normalize(gradient, dim=0), F.normalize(random, dim=0)):
        h = 1e-4
        near, far = (loss(at, direction) - loss(-at, direction) for at in (h, 2 * h))
        assert abs(float(gradient @ direction) - (8 * near - far) / (12 * h)) <= 1e-7 * float(gradient.norm())


def by_higher(algorithm, tasks, rates) -> torch.Tensor:
    """The outer gradient by the initial weights and, if they are learned, by the rates: `rates(name, step)`."""
    net = nn.Sequential(algorithm.net.backbone.blocks, nn.Flatten(), algorithm.net.head)
    names = [name for name, _ in algorithm.net.named_parameters()]
    learned = [p for p in algorithm.parameters() if p.requires_grad]
    others = learned[len(names) :]
    optimizer = torch.optim.SGD([{"params": [p], "lr": 1.0} for p in net.parameters()])
    total = [torch.zeros_like(p) for p in learned]
    for t in range(len(tasks)):
        with higher.innerloop_ctx(net, optimizer) as (fast, inner):
            for step in range(algorithm.inner_steps):
                loss = F.cross_entropy(fast(tasks.support_x[t]), tasks.support_y[t])
                inner.step(loss, override={"lr": [rates(name, step) for name in names]})
            loss = F.cross_entropy(fast(tasks.query_x[t]), tasks.query_y[t]) / len(tasks)
            for sum_, grad in zip(total, torch.autograd.grad(loss, [*fast.parameters(time=0), *others]), strict=True):
                sum_ += grad
    return torch.cat([g.flatten() for g in total])


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (ANIL, {}),
        (BOIL, {}),
        (MetaSGD, {"adapt_norm": True}),
        (MAMLPlusPlus, {"adapt_norm": True, "per_step_norm": False}),
    ],
)
def test_outer_gradient_equals_that_of_higher(cls, settings):
    torch.manual_seed(0)
    algorithm = make(cls, Conv4((1, 16, 16), channels=4, global_pool=True, running_stats=False), **settings)

    def rates(name: str, step: int) -> torch.Tensor:
        if name not in algorithm.adapted:
            return torch.zeros(())
        rate = algorithm.rate(name, step, way=3)
        return rate if isinstance(rate, torch.Tensor) else torch.tensor(rate, dtype=torch.float64)

    tasks = random_tasks(shape=(1, 16, 16), dtype=torch.float64)
    ours, theirs = step_gradient(algorithm, tasks), by_higher(algorithm, tasks, rates)
    assert (ours - theirs).norm() <= 1e-10 * theirs.norm()


@pytest.mark.parametrize(("cls", "changed"), [(ANIL, "head."), (BOIL, "backbone.")])
def test_anil_adapts_the_last_layer_only_and_boil_all_others(cls, changed):
    algorithm = make(cls, adapt_norm=True)
    initial = dict(algorithm.net.named_parameters())
    adapted = algorithm.adapt(random_tasks(dtype=torch.float64))
    assert adapted.keys() == {name for name in initial if name.startswith(changed)}
    assert all((adapted[name] != initial[name]).any() for name in adapted)


def test_anil_embeds_the_support_set_once():
    algorithm = make(ANIL, inner_steps=4)
    seen = []
    algorithm.net.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    tasks = random_tasks(tasks=1, dtype=torch.float64)
    algorithm.training_step(tasks)
    assert seen == [tasks.support_x.shape[1], tasks.query_x.shape[1]]


def test_boil_with_a_frozen_backbone_has_nothing_to_adapt():
    with pytest.raises(ValueError, match="leaves this method nothing to adapt"):
        make(BOIL, SmoothNet().requires_grad_(False))


@pytest.mark.parametrize("cls", [MetaSGD, MAMLPlusPlus])
def test_with_rates_that_are_all_equal_the_adapted_parameters_are_those_of_maml(cls):
    settings = {"per_step_norm": False} if cls is MAMLPlusPlus else {}
    tasks = random_tasks(dtype=torch.float64)
    torch.manual_seed(0)
    algorithm = cls(SmoothNet(), way=3, **STEPS, **settings).double()
    expected = make().adapt(tasks)
    for name, value in algorithm.adapt(tasks).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-8)  # the rate 0.1 was in float32


def test_meta_sgd_multiplies_each_weight_s_gradient_by_its_own_rate():
    algorithm = make(MetaSGD, inner_steps=1)
    tasks = random_tasks(tasks=1, dtype=torch.float64)
    weight = algorithm.net.head.weight
    loss = F.cross_entropy(algorithm.net(tasks.support_x[0]), tasks.support_y[0])
    by_hand = weight - algorithm.rates["head_weight"] * torch.autograd.grad(loss, weight)[0]
    torch.testing.assert_close(algorithm.adapt(tasks)["head.weight"][0], by_hand, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("way", [2, 5])
def test_learned_rates_serve_tasks_of_another_way(way):
    algorithm = make(MetaSGD).eval()
    assert algorithm(random_tasks(way=way, dtype=torch.float64)).shape[-1] == way


def test_protomaml_without_inner_learning_is_a_prototypical_network():
    tasks = random_tasks(dtype=torch.float64)
    algorithm = make(ProtoMAML, inner_lr=1e-15).eval()
    protonet = ProtoNet(algorithm.net.backbone).eval()
    protonet.one_batch = False  # as in the inner loop, batch norm sees support and queries apart
    torch.testing.assert_close(algorithm(tasks).softmax(-1), protonet(tasks).softmax(-1), rtol=1e-9, atol=1e-12)


def test_protomaml_trains_on_tasks_of_any_way():
    algorithm = make(ProtoMAML)
    for way in (2, 5):
        assert algorithm.training_step(random_tasks(way=way, dtype=torch.float64))["loss"].isfinite()


def test_weights_of_the_multi_step_loss_move_to_the_last_step():
    algorithm = make(MAMLPlusPlus, inner_steps=4, multi_step_loss_steps=100)
    assert algorithm.weights(0) == [0.25] * 4
    assert algorithm.weights(50) == pytest.approx([0.125] * 3 + [0.625])
    assert algorithm.weights(99) == pytest.approx([0.03 / 4] * 3 + [1 - 0.09 / 4])
    assert algorithm.weights(100) == [0, 0, 0, 1]


def test_multi_step_loss_is_the_weighted_sum_of_the_losses_of_shorter_inner_loops():
    tasks = random_tasks(dtype=torch.float64)
    losses = []
    for steps in (1, 2, 3):
        shorter = make(MAMLPlusPlus, per_step_norm=False)
        shorter.inner_steps = steps
        losses.append(float(shorter.loss(shorter(tasks), tasks.query_y).detach()))
    algorithm = make(MAMLPlusPlus, per_step_norm=False, multi_step_loss_steps=10)
    algorithm.done = 5
    expected = sum(weight * loss for weight, loss in zip([1 / 6, 1 / 6, 4 / 6], losses, strict=True))
    assert float(algorithm.training_step(tasks)["loss"]) == pytest.approx(expected, rel=1e-6)


def test_each_inner_step_has_its_own_batch_norm():
    algorithm, tasks = make(MAMLPlusPlus, inner_steps=2), random_tasks(dtype=torch.float64)
    name = algorithm.norm_names[0]
    with torch.no_grad():
        algorithm.norms[key(name)].copy_(torch.tensor([[1.0], [2.0]]).expand_as(algorithm.norms[key(name)]))
    params = algorithm.initial(tasks)
    assert [algorithm.at_step(params, step)[name].unique().item() for step in (0, 1, 7)] == [1, 2, 2]
    assert not any(p.requires_grad for layer in batch_norms(algorithm.net) for p in layer.parameters())


def test_batch_norm_of_each_step_starts_from_that_of_loaded_weights():
    algorithm, other = make(MAMLPlusPlus), SmoothNet().double()
    with torch.no_grad():
        for layer in batch_norms(other):
            layer.weight.fill_(3)
    algorithm.embedding.load_state_dict(other.state_dict())
    algorithm.start_from_backbone()
    scales = [algorithm.norms[key(name)] for name in algorithm.norm_names if name.endswith("weight")]
    assert len(scales) == 2
    assert all(scale.eq(3).all() for scale in scales)


@pytest.mark.parametrize("cls", [MAML, ANIL, MetaSGD, MAMLPlusPlus])
def test_a_head_on_a_loaded_backbone_is_zero_and_becomes_centred_class_means_in_one_step(cls):
    """By hand: the gradient of row c is the mean over the support of (1/N - [y = c]) f."""
    algorithm, tasks = make(cls), random_tasks(dtype=torch.float64)
    algorithm.start_from_backbone()
    algorithm.inner_steps = 1
    params = algorithm.adapt(tasks)
    features = torch.stack([algorithm.embedding.features(images) for images in tasks.support_x])
    signs = F.one_hot(tasks.support_y, 3).double() - 1 / 3  # [T, S, N]
    steps = signs.mT @ features / tasks.support_y.shape[1]
    rate = algorithm.rate("head.weight", 0, 3)
    torch.testing.assert_close(params["head.weight"], rate * steps)


def test_a_head_that_the_inner_loop_does_not_adapt_stays_random_on_a_loaded_backbone():
    """With a head of zeros, the gradient of the backbone would be zero in every inner step."""
    algorithm = make(BOIL)
    before = algorithm.net.head.weight.clone()
    algorithm.start_from_backbone()
    assert torch.equal(algorithm.net.head.weight, before)


def test_features_are_those_before_adaptation_with_the_batch_norm_of_the_first_step():
    algorithm, tasks = make(MAMLPlusPlus, inner_steps=2), random_tasks(dtype=torch.float64)
    with torch.no_grad():
        for values in algorithm.norms.values():
            values.copy_(torch.tensor([[5.0], [7.0]]).expand_as(values))
    assert all(layer.weight.eq(5).all() and layer.bias.eq(5).all() for layer in batch_norms(algorithm.embedding))
    features = algorithm.embedding.features(tasks.query_x[0])
    params = algorithm.at_step(algorithm.initial(tasks), 0)
    torch.testing.assert_close(algorithm.net.head(features), algorithm.classify(params, tasks.query_x)[0])


def test_first_order_steps_precede_steps_of_second_order():
    tasks = random_tasks(dtype=torch.float64)
    settings = {"per_step_norm": False, "learn_rates": False}
    annealed = make(MAMLPlusPlus, first_order_steps=1, **settings)
    first, second = (step_gradient(annealed, tasks) for _ in range(2))
    torch.testing.assert_close(first, step_gradient(make(first_order=True), tasks))
    torch.testing.assert_close(second, step_gradient(make(), tasks))
    assert (first - second).norm() > 1e-3 * second.norm()


def test_maml_plus_plus_counts_its_outer_steps_in_the_checkpoint():
    algorithm = make(MAMLPlusPlus)
    for _ in range(3):
        algorithm.training_step(random_tasks(dtype=torch.float64))
    restored = make(MAMLPlusPlus)
    restored.load_state_dict(algorithm.state_dict())
    assert restored.done == 3


def test_batch_norm_of_each_step_is_refused_where_it_has_no_meaning():
    with pytest.raises(ValueError, match="per_step_norm=true: needs"):
        make(MAMLPlusPlus, adapt_norm=True)
    with pytest.raises(ValueError, match="per_step_norm=true: needs"):
        make(MAMLPlusPlus, SmoothNet(running_stats=True))


@pytest.mark.parametrize(("cls", "settings"), FAMILY)
def test_tasks_together_have_the_gradient_of_tasks_in_a_loop(cls, settings):
    tasks = random_tasks(tasks=3, dtype=torch.float64)
    looped, together = (make(cls, **settings, task_batching=batching) for batching in ("loop", "vmap"))
    gradient = step_gradient(looped, tasks)
    assert (gradient - step_gradient(together, tasks)).norm() < 1e-10 * gradient.norm()


@pytest.mark.parametrize(("cls", "settings"), FAMILY)
def test_recomputed_inner_steps_have_the_same_gradient(cls, settings):
    tasks = random_tasks(dtype=torch.float64)
    gradient = step_gradient(make(cls, **settings), tasks)
    recomputed = step_gradient(make(cls, **settings, gradient_checkpointing=True), tasks)
    assert (gradient - recomputed).norm() < 1e-10 * gradient.norm()


@pytest.mark.parametrize(("cls", "settings"), FAMILY)
def test_inductive_predictions_do_not_depend_on_other_queries(cls, settings):
    algorithm, tasks = make(cls, **settings).eval(), random_tasks(dtype=torch.float64)
    fewer = replace(tasks, query_x=tasks.query_x[:, :2], query_y=tasks.query_y[:, :2])
    whole = algorithm.predict(tasks, "inductive")[:, :2]
    torch.testing.assert_close(whole, algorithm.predict(fewer, "inductive"), rtol=1e-9, atol=1e-12)
    assert not whole.requires_grad


def test_a_constructor_with_settings_has_the_parameters_of_its_base_class():
    own = parameters_of(MAMLPlusPlus)
    assert own.keys() == {
        *parameters_of(MAML),
        "learn_rates",
        "per_step_norm",
        "multi_step_loss_steps",
        "first_order_steps",
    }
    assert own["inner_lr"] == parameters_of(MAML)["inner_lr"]
