"""Classification of all training classes: losses by hand, the sampler, and later stages that start from it."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import Identity, bank_of

from metacv.algorithms.classifier import Classifier
from metacv.algorithms.heads.base import WithHead
from metacv.data.bank import ImageBank
from metacv.data.sampler import ImageSampler
from metacv.data.task import ImageBatch
from metacv.data.transforms import Augment
from metacv.errors import UserError
from metacv.model import load_checkpoint
from metacv.results import read_results

SHORT = ("train", "algo=classifier", "dataset.classes={train:6,val:6,test:6}", "way=3", "query=3", "eval_episodes=8")
SHORT = (*SHORT, "backbone.channels=8", "steps=6", "eval_every=3", "log_every=2", "meta_batch=16", "device=cpu")


def batch(images: int = 6, classes: int = 3) -> ImageBatch:
    generator = torch.Generator().manual_seed(0)
    return ImageBatch(torch.rand(images, 1, 2, 2, generator=generator), torch.arange(images) % classes)


def test_the_loss_is_the_cross_entropy_of_all_classes():
    model, images = Classifier(Identity((1, 2, 2)), classes=3), batch()
    scalars = model.training_step(images)
    logits = images.images.flatten(1) @ model.linear.weight.T + model.linear.bias
    expected = -logits.log_softmax(-1)[range(6), images.labels].mean()
    assert float(scalars["loss"]) == pytest.approx(float(expected.detach()), rel=1e-6)
    error = (logits.softmax(-1) - F.one_hot(images.labels, 3)).detach() / 6
    assert torch.allclose(model.linear.weight.grad, error.T @ images.images.flatten(1), atol=1e-6)


def test_rotations_pass_every_image_at_four_angles_and_tell_the_angle():
    model, images = Classifier(Identity((1, 2, 2)), classes=3, rotations=True), batch()
    loss = float(model.training_step(images)["loss"])
    turned = [torch.rot90(images.images, turns, (2, 3)).flatten(1) for turns in range(4)]
    by_class = torch.stack([F.cross_entropy(model.linear(x), images.labels) for x in turned]).mean()
    by_angle = torch.stack([F.cross_entropy(model.angle(x), torch.full((6,), t)) for t, x in enumerate(turned)]).mean()
    assert loss == pytest.approx(float((by_class + by_angle).detach()), rel=1e-6)


def test_cosine_logits_do_not_depend_on_lengths():
    model = Classifier(Identity((1, 2, 2)), classes=3, cosine=True)
    features = torch.rand(5, 4)
    assert torch.allclose(model.logits(features), model.logits(7 * features))
    assert float(model.logits(model.linear.weight).detach()[0, 0]) == pytest.approx(10, rel=1e-6)


def test_a_teacher_is_half_of_the_target_and_is_neither_trained_nor_saved():
    model, images = Classifier(Identity((1, 2, 2)), classes=3), batch()
    teacher = Classifier(Identity((1, 2, 2)), classes=3)
    model.learn_from(teacher)
    loss = float(model.training_step(images)["loss"])
    x = images.images.flatten(1)
    aim = (teacher.linear(x) / 4).softmax(-1)
    divergence = (aim * (aim.log() - (model.linear(x) / 4).log_softmax(-1))).sum(-1).mean()
    expected = (F.cross_entropy(model.linear(x), images.labels) + 16 * divergence) / 2
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert teacher.linear.weight.grad is None
    assert model.state_dict().keys() == {"linear.weight", "linear.bias"}
    with pytest.raises(UserError, match=r"algo\.teacher: must be a classifier of 3 classes"):
        model.learn_from(Classifier(Identity((1, 2, 2)), classes=4))


def test_an_epoch_draws_every_image_once_whatever_the_batch_size():
    bank = bank_of([3, 4, 5])
    whole = ImageSampler(bank, "none", 1, torch.device("cpu")).draw(24)
    assert sorted(whole[:12].tolist()) == sorted(whole[12:].tolist()) == list(range(12))
    assert whole[:12].tolist() != whole[12:].tolist()
    small = ImageSampler(bank, "none", 1, torch.device("cpu"))
    assert torch.equal(torch.cat([small.draw(5) for _ in range(4)]), whole[:20])
    assert not torch.equal(ImageSampler(bank, "none", 2, torch.device("cpu")).draw(24), whole)


def test_labels_are_the_classes_of_the_images_and_rotations_are_classes_of_their_own():
    sampler = ImageSampler(bank_of([3, 4, 5]), "as_classes", 0, torch.device("cpu"))
    drawn = sampler.sample(48)
    assert sampler.classes == 12
    assert torch.bincount(drawn.labels).tolist() == [3, 4, 5] * 4
    for image, label in zip(drawn.images, drawn.labels.tolist(), strict=True):
        upright = torch.rot90(image, -(label // 3), (1, 2))
        assert round(float(upright[0, 0, 0]) * 255) == label % 3


def test_ranks_share_a_batch_and_a_sampler_resumes():
    def sampler() -> ImageSampler:
        return ImageSampler(bank_of([6, 6]), "none", 3, torch.device("cpu"), Augment(1, True, 0.3, seed=5))

    whole, one, other = sampler(), sampler(), sampler()
    expected = whole.sample(10)
    parts = [one.sample(10, slice(0, 4)), other.sample(10, slice(4, 10))]
    assert torch.equal(torch.cat([part.images for part in parts]), expected.images)
    assert torch.equal(torch.cat([part.labels for part in parts]), expected.labels)
    later = sampler()
    later.load_state_dict(whole.state_dict())
    assert torch.equal(later.sample(7).images, whole.sample(7).images)


def test_a_second_stage_starts_from_the_first_backbone_and_adds_its_cost(metacv):
    assert metacv(*SHORT, "hydra.run.dir=first")[0] == 0
    words = [word for word in SHORT if not word.startswith(("algo=", "meta_batch="))]
    code, _, err = metacv(*words, "algo=meta_baseline", "init=first", "optimizer.lr=1e-30", "hydra.run.dir=second")
    assert code == 0, err
    first, second = load_checkpoint("first"), load_checkpoint("second")
    for name, value in first.build().embedding.named_parameters():
        assert torch.equal(value, second.build().embedding.get_parameter(name)), name
    assert second.training.stages == [f"Classifier on Glyphs, step {first.step}, sha256 {first.sha256[:16]}"]
    assert second.training.images == first.training.images + second.step * 4 * 3 * (1 + 3)
    assert second.training.flops > first.training.flops > 0
    assert metacv("evaluate", "checkpoint=second", "episodes=4", "hydra.run.dir=test")[0] == 0
    (result,) = read_results(Path("test/result.json")).results
    assert result.stages == second.training.stages
    assert (result.train_images, result.train_flops) == (second.training.images, second.training.flops)
    code, _, err = metacv(*words, "algo=meta_baseline", "init=first", "backbone.channels=4", "hydra.run.dir=third")
    assert (code, err.count("\n")) == (1, 1)
    assert "init=first: its backbone does not fit" in err


def test_flops_are_those_of_the_convolutions_and_products(metacv):
    assert metacv(*SHORT, "hydra.run.dir=run", "backbone.channels=4")[0] == 0
    checkpoint = load_checkpoint("run")
    macs = [28 * 28 * 4 * 9, 14 * 14 * 16 * 9, 7 * 7 * 16 * 9, 3 * 3 * 16 * 9, 4 * 6]
    # Forward, gradient by weights, and gradient by inputs, which the first layer does not need.
    each = sum(2 * 3 * mac for mac in macs) - 2 * macs[0]
    assert checkpoint.training.flops == checkpoint.step * 16 * each


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["classifier", "protonet"])
def test_best_weights_are_the_moving_average_and_resuming_continues_it(metacv, algo):
    words = [word for word in SHORT if not word.startswith("algo=")]
    words += [f"algo={algo}", "ema=0.5", "seed=2", "schedule=constant"]
    assert metacv(*words, "steps=2", "eval_every=2", "hydra.run.dir=run")[0] == 0
    assert metacv(*words, "steps=4", "eval_every=4", "hydra.run.dir=once")[0] == 0
    assert metacv("train", "resume=run", "steps=4", "eval_every=4")[0] == 0
    for name in ("algorithm", "average"):
        own, others = (torch.load(f"{run}/last.pt", weights_only=True)[name] for run in ("run", "once"))
        for key in own:
            assert torch.equal(own[key], others[key]), (name, key)


def test_the_average_is_that_of_the_weights_and_the_buffers(metacv, monkeypatch):
    seen = []
    import metacv.train as module

    step = module.training_step

    def recording(run, ranks):
        scalars = step(run, ranks)
        seen.append({name: value.clone().double() for name, value in run.algorithm.state_dict().items()})
        return scalars

    monkeypatch.setattr(module, "training_step", recording)
    assert metacv(*SHORT, "ema=0.9", "steps=3", "eval_every=3", "hydra.run.dir=run")[0] == 0
    best = load_checkpoint("run").content["algorithm"]
    for name in ("linear.weight", "backbone.blocks.0.0.weight", "backbone.blocks.0.1.running_mean"):
        # The first update copies the weights; later ones average.
        expected = 0.81 * seen[0][name] + 0.09 * seen[1][name] + 0.1 * seen[2][name]
        assert torch.allclose(best[name].double(), expected, atol=1e-6), name


def test_invalid_settings_have_one_clear_line(metacv):
    for words, message in {
        ("ema=1.5",): "ema=1.5: must be a number from 0 to below 1 or null",
        ("init=nowhere",): "nowhere: there is no such file",
        ("algo.teacher=nowhere",): f"{Path.cwd()}/nowhere: there is no such file",
        ("algo.label_smoothing=1",): "algo.label_smoothing=1: must be a number from 0 to below 1",
        (
            "head=ncm",
            "head.augment=3",
        ): "head.augment=3: needs a model that was trained with augment.*; use augment=0",
        ("head=logistic", "head.C=0"): "head.C=0: must be a number above 0 and at most 1000",
        ("++algo.classes=4",): "algo.classes: Classifier has no such setting",
    }.items():
        code, _, err = metacv(*SHORT, *words, "hydra.run.dir=run")
        assert (code, err) == (1, f"metacv: {message}\n"), words


def test_untrained_weights_have_the_loss_of_chance(metacv):
    model = Classifier(Identity((1, 2, 2)), classes=3)
    torch.nn.init.zeros_(model.linear.weight)
    torch.nn.init.zeros_(model.linear.bias)
    assert float(model.training_step(batch())["loss"]) == pytest.approx(math.log(3))


def test_flops_of_an_inner_loop_are_the_same_task_by_task_and_together(metacv):
    words = ("train", "algo=maml", *SHORT[2:], "meta_batch=2", "eval_every=6")
    for batching in ("loop", "vmap"):
        assert metacv(*words, f"algo.task_batching={batching}", f"hydra.run.dir={batching}")[0] == 0
    assert load_checkpoint("loop").training.flops == load_checkpoint("vmap").training.flops > 0


def test_a_second_stage_needs_the_same_normalization_and_a_head_is_checked_before_training(metacv, monkeypatch):
    assert metacv(*SHORT, "hydra.run.dir=first")[0] == 0
    code, _, err = metacv(*SHORT, "init=first", "normalize.mean=[0.5]", "hydra.run.dir=second")
    assert (code, err.count("\n")) == (1, 1)
    assert "init=first: set normalize as in its training, NormalizeConfig(mean=[0.0], std=[1.0])" in err
    monkeypatch.setattr("metacv.train.training_step", lambda *_: pytest.fail("trained"))
    code, _, err = metacv(*SHORT, "head=logistic", "head.C=-1", "hydra.run.dir=third")
    assert (code, err) == (1, "metacv: head.C=-1: must be a number above 0 and at most 1000\n")


def test_results_name_the_head_that_an_evaluation_changes(metacv):
    assert metacv(*SHORT, "hydra.run.dir=run")[0] == 0
    for head in ("logistic", "svm"):
        assert metacv("evaluate", "checkpoint=run", "episodes=4", f"head={head}", f"hydra.run.dir={head}")[0] == 0
    changes = [read_results(Path(head) / "result.json").results[0].changes for head in ("logistic", "svm")]
    assert [change["head"] for change in changes] == ["Logistic", "SVM"]
    code, out, _ = metacv("report", "run", "logistic", "svm", "hydra.run.dir=report")
    assert code == 0
    assert "Logistic" in out
    assert "SVM" in out
    page = Path("report/report.html").read_text()
    assert "Accuracy by cost of training in TFLOP: 3-way 1-shot, 4 episodes of Glyphs test" in page


def test_the_mean_to_subtract_is_that_of_the_training_images_also_on_other_images(metacv, monkeypatch):
    assert metacv(*SHORT, "hydra.run.dir=run")[0] == 0
    banks = []

    def centre(algorithm: WithHead, bank: ImageBank, _: object) -> None:
        banks.append(bank)
        algorithm.centre(bank.images / 255)

    monkeypatch.setattr("metacv.evaluate.centre", centre)
    words = ("evaluate", "checkpoint=run", "episodes=4", "head=cl2n")
    for changes in ([], ["dataset=glyphs", "dataset.seed=5", "dataset.classes={train:6,val:6,test:6}"]):
        code, _, err = metacv(*words, *changes)
        assert code == 0, err
    assert len(banks) == 2
    assert torch.equal(banks[0].images, banks[1].images)


def test_damaged_parts_of_a_checkpoint_have_one_clear_line(metacv):
    assert metacv(*SHORT, "head=cl2n", "hydra.run.dir=run")[0] == 0
    best, last = (torch.load(f"run/{name}.pt", weights_only=True) for name in ("best", "last"))
    damages = {
        "centre": [torch.full((8,), float("nan")), torch.zeros(3), [0.0] * 8],
        "training": [{"images": 10**26}, {"flops": 1e100}, {"classes": "6"}, {"other": 1}, []],
    }
    for name, values in damages.items():
        for value in values:
            torch.save(best | {name: value}, "damaged.pt")
            code, _, err = metacv("evaluate", "checkpoint=damaged.pt", "episodes=4", "hydra.run.dir=test")
            assert (code, err.count("\n")) == (1, 1), err
            assert "damaged" in err
    torch.save(last | {"sampler": {"position": -5}}, "run/last.pt")
    code, _, err = metacv("train", "resume=run", "steps=6")
    assert (code, err) == (1, "metacv: run/last.pt: its state does not fit its config (position -5)\n")
