import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.answers import all_answers
from models import knn
from models.aper import APER
from models.base import Learner
from models.fecam import FeCAM
from models.knn import KNN
from models.linear_joint import L2, LinearJoint, fit_softmax
from models.ncm_euclidean import NcmEuclidean
from models.ncm_lda import NcmLda
from models.ranpac import RANDOM_FEATURES, RanPAC
from models.simplecil import SimpleCIL
from models.streaming.lda import StreamingLDA
from models.streaming.ridge import RandomRidge
from tests.conftest import tiny_config
from utils.config.methods import METHODS
from utils.errors import ConfigError, NumericError

DIM, CPU = 6, torch.device("cpu")
LEARNERS = [SimpleCIL, APER, NcmEuclidean, NcmLda, FeCAM, RanPAC, KNN, LinearJoint]
JOINT = (LinearJoint,)  # what sees the data of all tasks


@dataclass
class Task:
    """Training data in memory. Augmented views are out of bounds: none of these learners may ask for one."""

    index: int
    first_row: int
    new_rows: int
    features: Tensor
    labels: Tensor
    all_seen: tuple[Tensor, Tensor] | None = None

    def test_view(self) -> Tensor:
        return self.features

    def seen(self) -> tuple[Tensor, Tensor]:
        if self.all_seen is None:
            raise AssertionError("a continual learner asked for earlier tasks' data")
        return self.all_seen


def stream(features: Tensor, labels: Tensor, sizes: list[int], *, joint: bool) -> list[Task]:
    tasks, first = [], 0
    for index, size in enumerate(sizes):
        own, seen = (labels >= first) & (labels < first + size), labels < first + size
        all_seen = (features[seen], labels[seen]) if joint else None
        tasks.append(Task(index, first, size, features[own], labels[own], all_seen))
        first += size
    return tasks


def untaught(kind: type[Learner], dim: int = DIM, **keys: float) -> Learner:
    return kind(tiny_config(model_name=sys.modules[kind.__module__].METHOD.name, **keys), dim, CPU, seed=0)


def taught(kind: type[Learner], features: Tensor, labels: Tensor, sizes: list[int], **keys: float) -> Learner:
    learner = untaught(kind, features.shape[1], **keys)
    for task in stream(features, labels, sizes, joint=kind in JOINT):
        learner.learn(task)
    return learner


def answers(learner: Learner, features: Tensor) -> Tensor:
    predictions = all_answers(learner, features)
    assert list(predictions) == ["sample"]
    assert predictions["sample"].module is None and predictions["sample"].entropy is None
    return predictions["sample"].scores


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    """Five well separated classes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 5
    return torch.randn(60, DIM, generator=generator) + 8 * torch.eye(DIM)[labels], labels


@pytest.mark.parametrize("kind", LEARNERS)
def test_separated_classes_are_learned_task_by_task(kind, data):
    learner = taught(kind, *data, [2, 1, 2])
    assert learner.tasks == 3 and learner.row_task.tolist() == [0, 0, 1, 2, 2]
    assert (answers(learner, data[0]).argmax(dim=1) == data[1]).float().mean() > 0.95


@pytest.mark.parametrize("kind", LEARNERS)
def test_state_round_trip_is_bit_exact(kind, data):
    learner = taught(kind, *data, [2, 3])
    copy = untaught(kind)
    copy.load_state_dict(learner.state_dict(), [])
    assert torch.equal(answers(copy, data[0]), answers(learner, data[0]))
    assert copy.parameter_counts() == learner.parameter_counts()
    assert all(isinstance(value, Tensor) for value in learner.state_dict().values())


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_restored_learner_learns_on_as_if_never_saved(kind, data):
    *first, last = stream(*data, [2, 1, 2], joint=kind in JOINT)
    learner, copy = untaught(kind), untaught(kind)
    for task in first:
        learner.learn(task)
    copy.load_state_dict(learner.state_dict(), [])
    learner.learn(last)
    copy.learn(last)
    assert torch.equal(answers(copy, data[0]), answers(learner, data[0]))


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_new_learner_is_the_same_to_the_bit(kind, data):
    assert torch.equal(*(answers(taught(kind, *data, [3, 2]), data[0]) for _ in range(2)))


@pytest.mark.parametrize("kind", LEARNERS)
@pytest.mark.parametrize("sizes", [[3], [1, 1, 1], [1, 2]])
@pytest.mark.parametrize("features", [torch.zeros(4, 3), torch.full((4, 3), 0.1), torch.eye(4)[:, :3]])
def test_no_nan_in_hard_cases(kind, sizes, features):
    """Zero or equal features, one image in a class, one class in a task, a single task."""
    learner = taught(kind, features, torch.tensor([0, 1, 2, 2]), sizes)
    scores = answers(learner, torch.cat([features, torch.zeros(1, 3), torch.ones(1, 3)]))
    assert scores.shape == (6, 3) and scores.isfinite().all()
    assert answers(learner, features[:0]).shape == (0, 3)


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_feature_that_is_not_finite_is_refused(kind, data):
    data[0][3, 2] = float("nan")
    with pytest.raises(NumericError, match="NaN or infinite"):
        taught(kind, *data, [5])


@pytest.mark.parametrize("kind", [SimpleCIL, NcmEuclidean, NcmLda, FeCAM, RanPAC, KNN])
def test_a_row_without_images_cannot_win(kind):
    """As when a domain lacks a class."""
    learner = untaught(kind, 2)
    learner.learn(Task(0, 0, 3, torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([0, 2])))
    scores = answers(learner, -torch.ones(1, 2))  # every cosine to an image is negative
    assert scores[0, 1] == -torch.inf and scores[0, [0, 2]].isfinite().all()


def test_only_the_joint_classifier_is_not_continual():
    assert [name for name, method in METHODS.items() if not method.continual] == ["linear_joint"]


def test_every_method_without_modules_is_held_here():
    assert {kind.__module__ for kind in LEARNERS} == {
        method.module for method in METHODS.values() if not method.modular
    }


def test_only_the_nearest_neighbours_keep_images():
    assert [name for name, method in METHODS.items() if method.exemplars] == ["knn"]


def test_nearest_mean_worked_by_hand():
    features = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    learner = taught(NcmEuclidean, features, torch.tensor([0, 0, 1]), [1, 1])
    assert learner.means.tolist() == [[1, 0], [0, 3]]
    torch.testing.assert_close(answers(learner, torch.tensor([[1.0, 1.0]])), torch.tensor([[-1.0, -5.0]]))


def test_nearest_mean_looks_at_the_length_too():
    learner = taught(NcmEuclidean, torch.tensor([[1.0, 0.0], [9.0, 9.0]]), torch.tensor([0, 1]), [2])
    assert answers(learner, torch.tensor([[0.1, 0.1], [100.0, 1.0]])).argmax(dim=1).tolist() == [0, 1]


def test_nearest_mean_is_exact_far_from_the_origin():
    """The squares are of the size 1e8; in float32 their difference would be lost."""
    learner = taught(NcmEuclidean, torch.tensor([[1e4, 0.0], [1e4, 1.0]]), torch.tensor([0, 1]), [2])
    torch.testing.assert_close(answers(learner, torch.tensor([[1e4, 0.25]])), torch.tensor([[-0.0625, -0.5625]]))


def test_fecam_worked_by_hand():
    """Covariance + 1 · I: of row 0 diag(3, 1), so its correlation is I; of row 1 [[3, 2], [2, 3]], so it is 2/3."""
    features = torch.tensor([[3.0, 0.0], [5.0, 0.0], [3.0, 3.0], [5.0, 5.0]])
    learner = taught(FeCAM, features, torch.tensor([0, 0, 1, 1]), [1, 1], shrinkage=1)
    assert learner.means.tolist() == [[4, 0], [4, 4]]
    x, y = 0 - 0.5**0.5, 1 - 0.5**0.5  # (0, 1) − (4, 4)/‖(4, 4)‖
    in_row_1 = 9 / 5 * (x * x + y * y - 4 / 3 * x * y)  # the inverse correlation is 9/5 · [[1, −2/3], [−2/3, 1]]
    torch.testing.assert_close(answers(learner, torch.tensor([[0.0, 7.0]])), torch.tensor([[-2.0, -in_row_1]]))


def test_fecam_adds_100_to_every_variance_as_pilot_does():
    features = torch.tensor([[0.0, 0.0, 1.0], [20.0, 20.0, 1.0]])  # covariance 200 between the first two
    learner = taught(FeCAM, features, torch.tensor([0, 0]), [1])
    correlation = torch.tensor([[1, 2 / 3, 0], [2 / 3, 1, 0], [0, 0, 1]])
    lower = torch.zeros(3, 3)
    lower[tuple(torch.tril_indices(3, 3))] = learner.factors[0]
    torch.testing.assert_close(lower.T @ lower, correlation.inverse())


def test_fecam_gives_every_class_its_own_metric():
    """Two means at equal angles: the class that spreads towards the sample wins, though they are equally near."""
    wide, narrow = torch.tensor([[8.0, 2.0], [12.0, -2.0]]), torch.tensor([[2.0, 8.0], [-2.0, 12.0]])
    across = torch.tensor([[-2.0, 8.0], [2.0, 12.0]])
    labels = torch.tensor([0, 0, 1, 1])
    sample = torch.tensor([[1.0, 1.0]])
    both = answers(taught(FeCAM, torch.cat([wide, narrow]), labels, [2], shrinkage=1), sample)
    assert both[0, 0] == pytest.approx(both[0, 1].item())
    assert answers(taught(FeCAM, torch.cat([wide, across]), labels, [2], shrinkage=1), sample).argmax() == 0


def test_nearest_neighbours_worked_by_hand():
    features = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 4.0]])  # cosines to (1, 0): 1, 0 and 0.6
    labels, sample = torch.tensor([0, 1, 1]), torch.tensor([[5.0, 0.0]])
    learner = taught(KNN, features, labels, [1, 1], neighbours=2, temperature=0.5)
    vote = torch.exp(torch.tensor(-0.4 / 0.5))
    torch.testing.assert_close(answers(learner, sample), torch.stack([torch.tensor(1.0), vote])[None])
    learner = taught(KNN, features, labels, [1, 1], neighbours=1)
    torch.testing.assert_close(answers(learner, sample), torch.tensor([[1.0, 0.6 - 2]]))  # no vote: behind all votes


def test_more_neighbours_than_images_is_all_images():
    learner = taught(KNN, torch.eye(2), torch.tensor([0, 1]), [2], neighbours=50)
    assert answers(learner, torch.tensor([[1.0, 0.0]])).argmax() == 0


def test_many_samples_are_answered_in_parts(data, monkeypatch):
    learner = taught(KNN, *data, [5])
    whole = answers(learner, data[0])
    monkeypatch.setattr(knn, "CHUNK_BYTES", 1)
    torch.testing.assert_close(answers(learner, data[0]), whole)


def test_simplecil_worked_by_hand():
    features = torch.tensor([[2.0, 0.0], [4.0, 8.0], [0.0, -5.0]])
    learner = taught(SimpleCIL, features, torch.tensor([0, 0, 1]), [1, 1])
    assert learner.prototypes.tolist() == [[3, 4], [0, -5]]  # of the features, not of normalised ones
    torch.testing.assert_close(
        answers(learner, torch.tensor([[0.0, 2.0], [10.0, 0.0]])), torch.tensor([[0.8, -1], [0.6, 0]])
    )


def test_simplecil_looks_at_the_angle_only():
    learner = taught(SimpleCIL, torch.tensor([[1.0, 0.0], [9.0, 9.0]]), torch.tensor([0, 1]), [2])
    assert answers(learner, torch.tensor([[0.1, 0.1], [100.0, 1.0]])).argmax(dim=1).tolist() == [1, 0]


def test_a_later_task_leaves_simplecils_earlier_prototypes_alone(data):
    one, two = taught(SimpleCIL, *data, [3]), taught(SimpleCIL, *data, [3, 2])
    assert torch.equal(two.prototypes[:3], one.prototypes)


def test_ncm_lda_is_the_streaming_lda(data):
    lda = StreamingLDA(DIM)
    lda.update(*data, 5)
    torch.testing.assert_close(answers(taught(NcmLda, *data, [1, 4]), data[0]), lda.scores(data[0]))


def test_ranpac_is_the_ridge_with_the_papers_width(data):
    ridge = RandomRidge(DIM, RANDOM_FEATURES, seed=0)
    ridge.update(*data, 5)
    assert RANDOM_FEATURES == 10_000
    torch.testing.assert_close(answers(taught(RanPAC, *data, [5]), data[0]), ridge.scores(data[0]))


def test_ranpac_may_divide_each_classs_weights_by_their_norm(data):
    plain = taught(RanPAC, *data, [2, 3])
    scores, lengths = answers(plain, data[0]), plain.ridge.weight.norm(dim=0).float()
    assert lengths.max() > 1.1 * lengths.min()
    torch.testing.assert_close(
        answers(taught(RanPAC, *data, [2, 3], ranpac_normalized=True), data[0]), scores / lengths
    )
    with pytest.raises(ConfigError, match="ranpac_normalized is for one regression; leave out ranpac_whitened"):
        untaught(RanPAC, ranpac_normalized=True, ranpac_whitened=True)


def test_aper_worked_by_hand():
    """Plain and adapted feature (1 + 1 numbers) count as long as they are, not each by its angle."""
    learner = taught(APER, torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([0, 1]), [2])
    torch.testing.assert_close(answers(learner, torch.tensor([[3.0, 4.0]])), torch.tensor([[0.6, 0.8]]))


def test_joint_classifier_is_at_the_minimum(data):
    """The gradient of cross-entropy + L2/2 · ‖W‖² vanishes, in the standardised features."""
    features, labels = data[0].double() * torch.arange(1, DIM + 1) + 30, data[1]  # unequal scales, off the origin
    weight, bias = fit_softmax(features, labels, 5)
    mean, spread = features.mean(dim=0), features.std(dim=0, correction=0)
    inner = (weight * spread[:, None]).requires_grad_()
    offset = (bias + mean @ weight).requires_grad_()
    loss = F.cross_entropy((features - mean) / spread @ inner + offset, labels) + L2 / 2 * inner.square().sum()
    assert max(g.abs().max() for g in torch.autograd.grad(loss, [inner, offset])) < 1e-4


def test_joint_classifier_forgets_how_the_data_came(data):
    """Only what has been seen counts, not the number of tasks."""
    torch.testing.assert_close(
        answers(taught(LinearJoint, *data, [1, 2, 2]), data[0]), answers(taught(LinearJoint, *data, [5]), data[0])
    )


def test_joint_classifier_works_without_gradients_enabled(data):
    with torch.no_grad():
        learner = taught(LinearJoint, *data, [5])
    assert not learner.weight.requires_grad and torch.equal(learner.weight, taught(LinearJoint, *data, [5]).weight)


@pytest.mark.parametrize(
    ("kind", "classifier", "trainable"),
    [
        (SimpleCIL, 5 * DIM, 0),
        (NcmEuclidean, 5 * DIM, 0),
        (FeCAM, 5 * (DIM + DIM * (DIM + 1) // 2), 0),
        (LinearJoint, 5 * (DIM + 1), 5 * (DIM + 1)),
    ],
)
def test_parameter_counts(kind, classifier, trainable, data):
    counts = taught(kind, *data, [2, 3]).parameter_counts()
    assert counts == {"luca_per_task": 0, "classifier": classifier, "trainable": trainable}


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_baseline_answers_single_images_and_says_why_it_refuses_batch(kind, data):
    learner = taught(kind, *data, [5])
    assert torch.equal(learner.answer(data[0]).scores, answers(learner, data[0]))
    with pytest.raises(ConfigError, match=r"'batch' cannot answer single images .*order.*choose one of: sample"):
        learner.answer(data[0], "batch")
    with pytest.raises(ConfigError, match=r"'lda' .*has none of that name"):
        learner.answer(data[0], "lda")
