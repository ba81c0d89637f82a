"""Heads at test time: against scikit-learn, closed forms and hand calculations."""

import pytest
import torch
import torch.nn.functional as F
from conftest import Identity, random_tasks
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from metacv.algorithms.heads.base import WithHead
from metacv.algorithms.heads.finetune import Finetune
from metacv.algorithms.heads.logistic import Logistic
from metacv.algorithms.heads.ncm import CL2N, NearestMean
from metacv.algorithms.heads.ridge import Ridge
from metacv.algorithms.heads.svm import SVM
from metacv.algorithms.metric.protonet import ProtoNet
from metacv.config import AugmentConfig
from metacv.data.task import TaskBatch


def feature_tasks(shot=5, way=5, dim=64, tasks=6, dtype=torch.float64) -> TaskBatch:
    """Tasks of positive features, as after a ReLU, whose classes overlap."""
    generator = torch.Generator().manual_seed(shot)
    centres = torch.rand(tasks, way, dim, generator=generator, dtype=dtype)

    def features(each: int) -> torch.Tensor:
        noise = torch.randn(tasks, way, each, dim, generator=generator, dtype=dtype)
        return (centres.unsqueeze(2) + 0.8 * noise).clamp(0).flatten(1, 2)

    labels = [torch.arange(way).repeat_interleave(each).expand(tasks, -1) for each in (shot, 15)]
    return TaskBatch(features(shot), labels[0], features(15), labels[1], way, torch.arange(way).expand(tasks, -1))


@pytest.mark.parametrize("shot", [1, 5, 30])
@pytest.mark.parametrize("C", [0.1, 1.0, 10.0])
def test_logistic_gives_the_probabilities_of_scikit_learn(shot, C):
    tasks = feature_tasks(shot)
    own = Logistic(C=C)(tasks).softmax(-1)
    for t in range(len(tasks)):
        support, query = F.normalize(tasks.support_x[t], dim=-1), F.normalize(tasks.query_x[t], dim=-1)
        model = LogisticRegression(C=C, tol=1e-10, max_iter=10_000).fit(support, tasks.support_y[t])
        reference = torch.from_numpy(model.predict_proba(query))
        assert (own[t] - reference).abs().max() < 1e-3


def test_svm_gives_the_decisions_of_scikit_learn():
    tasks = feature_tasks(5)
    own = SVM()(tasks)
    support, query = F.normalize(tasks.support_x[0], dim=-1), F.normalize(tasks.query_x[0], dim=-1)
    model = LinearSVC(dual=True, random_state=0, max_iter=10_000).fit(support, tasks.support_y[0])
    assert torch.allclose(own[0].double(), torch.from_numpy(model.decision_function(query)), atol=1e-6)
    assert SVM()(feature_tasks(5, way=2)).shape == (6, 30, 2)


def test_ridge_solves_the_normal_equations_with_less_work():
    tasks = feature_tasks(5)
    support, query = F.normalize(tasks.support_x, dim=-1), F.normalize(tasks.query_x, dim=-1)
    targets = F.one_hot(tasks.support_y, 5).double()
    weights = torch.linalg.solve(support.mT @ support + 0.7 * torch.eye(64, dtype=torch.float64), support.mT @ targets)
    assert torch.allclose(Ridge(penalty=0.7)(tasks), query @ weights, atol=1e-10)


def test_nearest_mean_and_its_centred_form_by_hand():
    support, query = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]]), torch.tensor([[[5.0, 0.0]]])
    labels = torch.arange(2).unsqueeze(0)
    tasks = TaskBatch(support, labels, query, torch.zeros(1, 1, dtype=torch.long), 2, labels)
    assert torch.allclose(NearestMean(normalize=False)(tasks), torch.tensor([[[-20.0, -29.0]]]))
    # (0.6, 0.8) and (0, 1) against (1, 0)
    assert torch.allclose(NearestMean()(tasks), torch.tensor([[[-0.8, -2.0]]]))
    centred = CL2N()
    centred.centre = torch.tensor([0.0, 1.0])
    # (3, 3) and (0, 1) against (5, -1), all of length 1: squared distances 2 - 2 cos
    cosines = torch.tensor([12 / (18 * 26) ** 0.5, -1 / 26**0.5])
    assert torch.allclose(centred(tasks), 2 * cosines - 2)


def test_with_cosine_the_label_is_that_of_the_largest_cosine_to_a_class_mean():
    support = torch.tensor([[[1.0, 0.0], [0.0, 3.0], [0.8, 0.6], [1.6, 1.2]]])
    labels, query = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[[2.0, 0.0]]])
    tasks = TaskBatch(support, labels, query, torch.zeros(1, 1, dtype=torch.long), 2, labels[:, :1])
    # The means (0.5, 0.5) and (0.8, 0.6) against (1, 0): the first is scaled to (0.71, 0.71).
    assert torch.allclose(NearestMean()(tasks), torch.tensor([[[-0.5, -0.4]]]))
    assert torch.allclose(NearestMean(cosine=True)(tasks), torch.tensor([[[2 * 0.5**0.5 - 2, 2 * 0.8 - 2]]]))
    with pytest.raises(ValueError, match="cosine=true: needs normalize=true"):
        NearestMean(normalize=False, cosine=True)


def test_nearest_mean_keeps_its_digits_far_from_the_origin():
    tasks = feature_tasks(dtype=torch.float32)
    far = tasks.map(lambda features: features + 10_000)
    expected = NearestMean(normalize=False)(far.map(torch.Tensor.double))
    assert torch.allclose(NearestMean(normalize=False)(far).double(), expected, atol=0.1)


@pytest.mark.parametrize("cosine", [False, True])
def test_finetune_learns_the_support_set_and_leaves_features_alone(cosine):
    tasks = feature_tasks(5, dtype=torch.float32)
    head = Finetune(steps=300, lr=0.1, cosine=cosine)
    before = tasks.support_x.clone()
    on_support = head(TaskBatch(tasks.support_x, tasks.support_y, tasks.support_x, tasks.support_y, 5, tasks.classes))
    assert (on_support.argmax(-1) == tasks.support_y).float().mean() > 0.98
    assert torch.equal(tasks.support_x, before)
    one = next(tasks.split(1))
    assert torch.allclose(head(tasks)[:1], head(one), atol=1e-4)  # tasks do not share weights


def test_flip_averages_the_features_of_an_image_and_its_mirror_image():
    tasks = random_tasks(shape=(1, 1, 2))
    model = WithHead(ProtoNet(Identity()), NearestMean(normalize=False, flip=True), AugmentConfig())
    images = tasks.support_x.flatten(0, 1)
    assert torch.allclose(model.embed(images), images.flatten(1).mean(1, keepdim=True).expand(-1, 2))


def test_copies_are_labelled_as_their_images_and_the_same_every_time():
    tasks = random_tasks(way=3, shot=2, shape=(1, 6, 6))
    model = WithHead(ProtoNet(Identity((1, 6, 6))), NearestMean(augment=4), AugmentConfig(crop=2, flip=True))
    embedded = model.embedded(tasks, one_batch=True)
    assert embedded.support_x.shape == (2, 6 + 24, 36)
    assert embedded.support_y[0].tolist() == [0, 0, 1, 1, 2, 2] + 8 * [0] + 8 * [1] + 8 * [2]
    assert torch.equal(embedded.support_x[:, :6], tasks.support_x.flatten(2))
    assert not torch.equal(embedded.support_x[0, 6], embedded.support_x[0, 0])
    assert torch.equal(model.embedded(tasks, one_batch=True).support_x, embedded.support_x)
