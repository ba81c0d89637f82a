"""Methods that compare features, against values calculated by hand."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import Identity, SmoothNet, random_tasks
from torch import Tensor, nn

from metacv.algorithms.distances import cosine_similarity, negative_squared_distance
from metacv.algorithms.metric.dn4 import DN4
from metacv.algorithms.metric.feat import FEAT
from metacv.algorithms.metric.matchingnet import MatchingNet
from metacv.algorithms.metric.protonet import ProtoNet
from metacv.algorithms.metric.r2d2 import R2D2
from metacv.algorithms.metric.relationnet import ConvRelation, RelationNet
from metacv.backbones.conv4 import Conv4
from metacv.data.task import TaskBatch


def points(*xy) -> torch.Tensor:
    return torch.tensor(xy, dtype=torch.float64).view(1, len(xy), 1, 1, 2)


def two_classes() -> TaskBatch:
    """Class 0 around (1, 0), class 1 around (0, 2); one query each."""
    return TaskBatch(
        support_x=points((0, 0), (2, 0), (0, 1), (0, 3)),
        support_y=torch.tensor([[0, 0, 1, 1]]),
        query_x=points((1, 1), (3, 2)),
        query_y=torch.tensor([[0, 1]]),
        way=2,
        classes=torch.tensor([[0, 1]]),
    )


def test_distances_and_cosines_keep_their_digits_in_bf16_and_far_from_the_origin():
    generator = torch.Generator().manual_seed(0)
    features, centres = (torch.randn(2, n, 30, generator=generator) for n in (4, 3))
    pairs = features.double().unsqueeze(2), centres.double().unsqueeze(1)
    with torch.autocast("cpu", torch.bfloat16):
        distances, cosines = (
            negative_squared_distance(features + 100, centres + 100),
            cosine_similarity(features, centres),
        )
    assert distances.dtype == cosines.dtype == torch.float32
    torch.testing.assert_close(distances.double(), -(pairs[0] - pairs[1]).square().sum(-1), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(cosines.double(), F.cosine_similarity(*pairs, dim=-1), rtol=1e-5, atol=1e-6)


def test_protonet_logits_are_minus_squared_distances_summed_over_dimensions():
    logits = ProtoNet(Identity()).double()(two_classes())
    # (1,1) to (1,0): 1; to (0,2): 1+1. (3,2) to (1,0): 4+4; to (0,2): 9.
    assert logits.tolist() == [[[-1.0, -2.0], [-8.0, -9.0]]]


def test_protonet_with_cosine_metric_divides_the_cosine_by_the_temperature():
    logits = ProtoNet(Identity(), metric="cosine", temperature=0.5).double()(two_classes())
    expected = [[1 / math.sqrt(2), 1 / math.sqrt(2)], [3 / math.sqrt(13), 2 / math.sqrt(13)]]
    torch.testing.assert_close(logits[0], 2 * torch.tensor(expected, dtype=torch.float64))


def test_protonet_loss_is_the_cross_entropy_of_the_softmax_over_distances():
    tasks = two_classes()
    algorithm = ProtoNet(Identity()).double()
    by_hand = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))) / 2
    assert float(algorithm.loss(algorithm(tasks), tasks.query_y)) == pytest.approx(by_hand, rel=1e-12)


class DotProduct(nn.Module):
    """l . r = ((l + r)^2 - (l^2 + r^2)) / 2, from the sum of a pair's halves as relation modules take it."""

    def first_layer(self, images, part):
        return torch.cat([images.flatten(1), images.flatten(1) ** 2], dim=1)

    def forward(self, sums):
        both, squares = sums.chunk(2, dim=1)
        return (both**2 - squares).sum(1) / 2


def test_relationnet_compares_each_query_with_the_sum_of_the_support_maps_of_a_class():
    algorithm = RelationNet(SmoothNet(image_shape=(2, 8, 8), channels=2), relation="conv")
    algorithm.backbone, algorithm.relation = Identity(), DotProduct()
    # sums: class 0 (2, 0), class 1 (0, 4); the pair is joined along the channel axis
    tasks = two_classes()
    channels = replace(tasks, support_x=tasks.support_x.transpose(2, 4), query_x=tasks.query_x.transpose(2, 4))
    assert algorithm(channels).tolist() == [[[2.0, 4.0], [6.0, 8.0]]]
    algorithm.shot = 6  # three times as many images as in the task
    assert algorithm(channels).tolist() == [[[6.0, 12.0], [18.0, 24.0]]]


def test_relationnet_gives_a_class_the_same_score_however_often_its_images_are_repeated():
    torch.manual_seed(0)
    network = SmoothNet(image_shape=(1, 8, 8), running_stats=True)
    algorithm, tasks = RelationNet(network, shot=1), random_tasks(shape=(1, 8, 8))
    repeated = tasks.support_x.unflatten(1, (3, 2)).repeat(1, 1, 4, 1, 1, 1).flatten(1, 2)
    more = replace(tasks, support_x=repeated, support_y=torch.arange(3).repeat_interleave(8).expand(2, -1))
    torch.testing.assert_close(algorithm.predict(more, "inductive"), algorithm.predict(tasks, "inductive"))


def test_relationnet_loss_is_the_mean_squared_error_to_one_hot():
    algorithm = RelationNet(SmoothNet(image_shape=(1, 8, 8)), relation="conv")
    scores = torch.tensor([[[0.5, 0.2], [0.3, 0.9]]])
    loss = algorithm.loss(scores, torch.tensor([[0, 1]]))
    assert float(loss) == pytest.approx((0.25 + 0.04 + 0.09 + 0.01) / 4, rel=1e-6)
    probabilities = algorithm.probabilities(scores)
    assert probabilities[0, 1].tolist() == pytest.approx([0.25, 0.75])
    torch.testing.assert_close(algorithm.softmax_logits(scores).softmax(-1), probabilities)


def test_relationnet_with_cross_entropy_has_logits_of_any_size_and_a_softmax_over_the_classes():
    torch.manual_seed(0)
    algorithm = RelationNet(SmoothNet(image_shape=(1, 8, 8)), loss="cross_entropy")
    algorithm.relation.fc2.bias.data.fill_(-7)
    tasks = random_tasks(shape=(1, 8, 8))
    logits = algorithm(tasks)
    assert (logits < 0).all()
    usual = RelationNet(SmoothNet(image_shape=(1, 8, 8)))
    usual.load_state_dict(algorithm.state_dict())
    torch.testing.assert_close(usual(tasks), logits.sigmoid())
    scores = torch.tensor([[[0.0, math.log(3)], [math.log(4), 0.0]]])
    torch.testing.assert_close(algorithm.probabilities(scores), torch.tensor([[[0.25, 0.75], [0.8, 0.2]]]))
    assert algorithm.softmax_logits(scores) is scores
    loss = algorithm.loss(scores, torch.tensor([[1, 1]]))
    assert float(loss) == pytest.approx(-(math.log(0.75) + math.log(0.2)) / 2, rel=1e-6)


def test_mlp_relation_refuses_the_squared_error():
    with pytest.raises(ValueError, match="loss=mse needs relation=conv"):
        RelationNet(Identity(), relation="mlp", loss="mse")


def test_mlp_relation_gives_each_class_its_share_of_the_mean_scores():
    algorithm = RelationNet(Identity(), relation="mlp").double()
    algorithm.relation = DotProduct()
    # queries (1,1) and (3,2) with (0,0) (2,0) | (0,1) (0,3): 0 2 | 1 3 and 0 6 | 2 6
    expected = torch.tensor([[[2 / 6, 4 / 6], [6 / 14, 8 / 14]]], dtype=torch.float64)
    torch.testing.assert_close(algorithm(two_classes()).exp(), expected)


def test_mlp_scores_are_never_negative_and_probabilities_sum_to_one():
    torch.manual_seed(0)
    tasks = random_tasks()
    algorithm = RelationNet(SmoothNet(), relation="mlp")
    algorithm.relation.fc2.weight.data *= 100
    torch.testing.assert_close(algorithm(tasks).exp().sum(-1), torch.ones(2, 12))
    assert (algorithm.relation(torch.randn(50, 8)) >= 0).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: ProtoNet(SmoothNet((1, 8, 8))),
        lambda: ProtoNet(SmoothNet((1, 8, 8)), metric="cosine"),
        lambda: RelationNet(SmoothNet((1, 8, 8)), relation="conv"),
        lambda: RelationNet(SmoothNet((1, 8, 8)), relation="mlp"),
    ],
    ids=["sqeuclidean", "cosine", "conv", "mlp"],
)
def test_the_class_of_a_support_image_follows_from_its_label_not_its_position(make):
    torch.manual_seed(0)
    algorithm = make().double().eval()
    tasks = random_tasks(shape=(1, 8, 8), dtype=torch.float64)
    order = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)])
    row = torch.arange(2).unsqueeze(1)
    shuffled = replace(tasks, support_x=tasks.support_x[row, order], support_y=tasks.support_y[row, order])
    assert not torch.equal(shuffled.support_y, tasks.support_y)
    torch.testing.assert_close(algorithm(shuffled), algorithm(tasks), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("side", "maps", "features"), [(28, 5, 64), (84, 19, 64 * 3 * 3)])
def test_relation_module_has_the_shapes_of_the_paper(side, maps, features):
    encoder = Conv4((1, side, side), downsample=["max_pool", "max_pool", "none", "none"], padding=[0, 0, 1, 1])
    assert encoder.out_shape == (64, maps, maps)
    module = ConvRelation(encoder.out_shape, hidden=8)
    assert module.fc1.in_features == features
    scores = module(torch.randn(3, 64, maps, maps))
    assert scores.shape == (3,)
    assert ((scores >= 0) & (scores <= 1)).all()


@pytest.mark.parametrize(("kind", "training"), [("conv", True), ("conv", False), ("mlp", False)])
def test_scores_are_those_of_the_relation_module_on_concatenated_pairs(kind, training):
    """Support maps come before query maps along the channels; the layers are those of the paper's figure 2."""
    torch.manual_seed(0)
    algorithm = RelationNet(SmoothNet(image_shape=(1, 10, 10), channels=3), relation=kind).double().train(training)
    left, right = torch.randn(2, 3, 3, 5, 5).double(), torch.randn(2, 4, 3, 5, 5).double()
    module = algorithm.relation

    def joined(task: int) -> torch.Tensor:
        pairs = torch.stack([torch.cat([one, other]) for other in right[task] for one in left[task]])
        if kind == "mlp":
            return F.softplus(module.fc2(F.relu(module.fc1(pairs.flatten(1)))))
        for conv, norm, *_ in module.blocks:
            pairs = F.conv2d(pairs, conv.weight, conv.bias, padding=conv.padding)
            pairs = F.batch_norm(pairs, norm.running_mean.clone(), norm.running_var.clone(), norm.weight, norm.bias,
                                 training)  # fmt: skip
            pairs = F.max_pool2d(F.relu(pairs), 2)
        return torch.sigmoid(module.fc2(F.relu(module.fc1(pairs.flatten(1)))))

    expected = torch.stack([joined(task).view(4, 3) for task in range(2)])
    given = (left, right) if kind == "conv" else (left.flatten(2), right.flatten(2))
    torch.testing.assert_close(algorithm.scores(*given), expected, rtol=1e-12, atol=1e-12)


def test_a_learned_temperature_starts_without_effect_and_is_trained():
    tasks = two_classes()
    model = ProtoNet(Identity(), metric="cosine", temperature=0.1, learn_temperature=True).double()
    torch.testing.assert_close(model(tasks), ProtoNet(Identity(), metric="cosine", temperature=0.1).double()(tasks))
    model.training_step(tasks)
    assert model.scale.grad.abs() > 0


def test_matchingnet_weights_the_labels_of_the_support_by_a_softmax_over_cosines():
    logits = MatchingNet(Identity(), scale=2.0).double()(two_classes())
    # Cosines of (1,1) with (0,0), (2,0), (0,1), (0,3): 0 and three times 1 / sqrt(2).
    weights = torch.tensor([0, *[2 / math.sqrt(2)] * 3], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(logits[0, 0], torch.stack([weights[:2].sum(), weights[2:].sum()]).log())


def test_matchingnet_gives_a_class_with_more_support_images_their_whole_weight():
    tasks = replace(two_classes(), support_y=torch.tensor([[0, 0, 0, 1]]))
    probabilities = MatchingNet(Identity(), scale=2.0).double()(tasks).exp()[0, 0]
    weights = torch.tensor([0, *[2 / math.sqrt(2)] * 3], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(probabilities, torch.stack([weights[:3].sum(), weights[3]]))
    assert MatchingNet(Identity(), scale=1000.0)(tasks.map(Tensor.float)).isfinite().all()


def test_r2d2_is_ridge_regression_with_a_learned_scale_and_shift():
    model, tasks = R2D2(Identity(), penalty=2.0, scale=3.0, learn_penalty=True).double(), two_classes()
    model.shift.data.fill_(0.5)
    logits = model(tasks)
    support, query = tasks.support_x.flatten(2)[0], tasks.query_x.flatten(2)[0]
    targets = F.one_hot(tasks.support_y[0], 2).double()
    weights = torch.linalg.inv(support.T @ support + 2 * torch.eye(2)) @ support.T @ targets
    torch.testing.assert_close(logits[0], 3 * query @ weights + 0.5, rtol=1e-7, atol=1e-7)
    model.training_step(tasks)
    assert all(p.grad.abs() > 0 for p in (model.log_penalty, model.scale))
    fixed = R2D2(Identity(), penalty=2.0, scale=3.0, learn_penalty=False)
    assert not fixed.log_penalty.requires_grad


@pytest.mark.parametrize("neighbours", [2, 8, 99])  # the classes have 6 and 18 places
def test_dn4_sums_the_cosines_to_the_nearest_places_over_all_places_of_the_query(neighbours):
    tasks = random_tasks(tasks=1, way=2, shot=2, query=3, shape=(5, 2, 3), dtype=torch.float64)
    tasks = replace(tasks, support_y=torch.tensor([[1, 0, 1, 1]]))
    logits = DN4(Identity((5, 2, 3)), neighbours)(tasks)
    for q in range(6):
        for c in range(2):
            total = 0.0
            for place in tasks.query_x[0, q].flatten(1).T:
                own = tasks.support_x[0, tasks.support_y[0] == c].flatten(2).permute(0, 2, 1).flatten(0, 1)
                cosines = F.cosine_similarity(own, place.unsqueeze(0))
                total += float(cosines.sort(descending=True).values[:neighbours].sum())
            assert float(logits[0, q, c]) == pytest.approx(total, rel=1e-9)


def test_feat_adapts_prototypes_by_attention_and_classifies_by_distance():
    tasks = random_tasks(tasks=2, way=3, shape=(1, 1, 4), dtype=torch.float64)
    model = FEAT(Identity((1, 1, 4)), temperature=5.0, balance=0.1, dropout=0.5).double().eval()
    logits = model(tasks)
    for t in range(2):
        support = tasks.support_x[t].flatten(1)
        prototypes = torch.stack([support[tasks.support_y[t] == c].mean(0) for c in range(3)])
        q, k, v = (prototypes @ layer.weight.T for layer in (model.query, model.key, model.value))
        rows = []
        for c in range(3):
            weights = torch.stack([q[c] @ k[other] / 2 for other in range(3)]).softmax(0)
            mixed = sum(weights[other] * v[other] for other in range(3))
            rows.append(F.layer_norm(prototypes[c] + model.output(mixed), (4,)))
        for i, query in enumerate(tasks.query_x[t].flatten(1)):
            expected = torch.stack([-((query - row) ** 2).sum() / 5 for row in rows])
            torch.testing.assert_close(logits[t, i], expected)


def test_feat_adds_a_loss_that_compares_adapted_images_with_the_mean_of_their_class():
    tasks = random_tasks(tasks=1, way=3, shot=2, query=2, shape=(1, 1, 4), dtype=torch.float64)
    tasks = replace(tasks, support_y=torch.tensor([[0, 1, 2, 0, 0, 1]]))
    model = FEAT(Identity((1, 1, 4)), temperature=5.0, balance=0.1, dropout=0.0).double()
    adapted = []
    for c in range(3):
        own = [tasks.support_x[0, tasks.support_y[0] == c], tasks.query_x[0, tasks.query_y[0] == c]]
        adapted.append(model.adapt(torch.cat(own).flatten(1)))
    assert [len(one) for one in adapted] == [5, 4, 3]
    means = torch.stack([one.mean(0) for one in adapted])
    logits = torch.cat([-((one.unsqueeze(1) - means) ** 2).sum(-1) / 5 for one in adapted])
    expected = F.cross_entropy(logits, torch.arange(3).repeat_interleave(torch.tensor([5, 4, 3])))
    scalars = model.training_step(tasks)
    assert float(scalars["contrast"]) == pytest.approx(float(expected.detach()), rel=1e-9)
    plain = FEAT(Identity((1, 1, 4)), temperature=5.0, balance=0.0, dropout=0.0).double()
    plain.load_state_dict(model.state_dict())
    plain.training_step(tasks)
    added = torch.autograd.grad(expected, [*model.parameters()], allow_unused=True)
    for both, one, extra in zip(model.parameters(), plain.parameters(), added, strict=True):
        torch.testing.assert_close(both.grad, one.grad + 0.1 * extra)
