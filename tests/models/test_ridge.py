import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.streaming import ridge
from models.streaming.ridge import RIDGES, RandomRidge, ridge_path_errors
from models.streaming.ridge_pair import RidgePair
from utils.errors import NumericError

DIM, ROWS = 6, 4
TASKS = [(0, 1), (2, 3)]


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % ROWS
    return torch.randn(48, DIM, generator=generator) + 2 * torch.randn(ROWS, DIM, generator=generator)[labels], labels


def parts(data: tuple[Tensor, Tensor], tasks=TASKS) -> list[tuple[Tensor, Tensor]]:
    return [tuple(v[torch.isin(data[1], torch.tensor(rows))] for v in data) for rows in tasks]


def fitted(tasks: list[tuple[Tensor, Tensor]], width: int, seed: int = 0) -> RandomRidge:
    model = RandomRidge(DIM, width, seed)
    for features, labels in tasks:
        model.update(features, labels, ROWS)
    return model


def direct_scores(model: RandomRidge, data: tuple[Tensor, Tensor], probes: Tensor) -> Tensor:
    """Ridge regression on all data at once, by the textbook formula."""
    hidden = (data[0] @ model.projection).relu().double()
    gram = hidden.T @ hidden + model.ridge * torch.eye(model.width)
    weight = torch.linalg.solve(gram, hidden.T @ F.one_hot(data[1], ROWS).double())
    return (probes @ model.projection).relu().double() @ weight


def direct_errors(hidden: Tensor, targets: Tensor, judge: Tensor, judge_targets: Tensor) -> Tensor:
    eye = torch.eye(hidden.shape[1]).double()
    weights = [torch.linalg.lstsq(hidden.T @ hidden + r * eye, hidden.T @ targets)[0] for r in RIDGES]
    return torch.stack([(judge @ weight - judge_targets).square().sum() for weight in weights])


# width 400: root form throughout; 120: root, then Gram; 20: Gram at once, as is the usual case with much data
@pytest.mark.parametrize("width", [400, 120, 20])
def test_streamed_tasks_equal_ridge_regression_on_all_data(data, width):
    model = fitted(parts(data), width)
    probes = data[0] + 0.1
    assert len(model.statistic) == (48 if width == 400 else width)
    torch.testing.assert_close(model.scores(probes).double(), direct_scores(model, data, probes), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [400, 120, 20])
def test_order_of_tasks_is_irrelevant(data, width):
    tasks = parts(data, [(0,), (1,), (2, 3)])
    first, *others = [fitted(list(order), width) for order in itertools.permutations(tasks)]
    for other in others:
        assert other.ridge == first.ridge
        torch.testing.assert_close(other.scores(data[0]), first.scores(data[0]), rtol=1e-4, atol=1e-5)


def test_the_root_holds_no_image_but_the_whole_gram(data):
    model = fitted(parts(data), width=400)
    hidden = (data[0] @ model.projection).relu().double()
    torch.testing.assert_close(model.statistic.T @ model.statistic, hidden.T @ hidden)
    cosines = F.normalize(model.statistic, dim=1) @ F.normalize(hidden, dim=1).T
    assert (model.statistic < 0).any()  # random ReLU features are never negative
    assert cosines[1:].abs().max() < 0.999  # a first row alone may be an image's: QR starts from it


@pytest.mark.parametrize("images", [10, 60])  # fewer and more than the 30 random features
def test_one_eigendecomposition_serves_all_ridges(images):
    generator = torch.Generator().manual_seed(1)
    fit, judge = torch.rand(images, 30, generator=generator).double(), torch.rand(8, 30, generator=generator).double()
    targets, judge_targets = F.one_hot(torch.arange(images) % 3).double(), F.one_hot(torch.arange(8) % 3).double()
    errors = ridge_path_errors(fit, targets, judge, judge_targets)
    usable = torch.tensor(RIDGES) > 1e-6  # below, the direct formula itself is rounding
    torch.testing.assert_close(
        errors[usable], direct_errors(fit, targets, judge, judge_targets)[usable], rtol=1e-5, atol=1e-8
    )


# as above: root form, the change from root to Gram form with the newest task, Gram form
@pytest.mark.parametrize("width", [400, 120, 20])
@pytest.mark.parametrize("best", [1e-8, 1e-3, 1e2])
def test_an_image_left_out_is_scored_by_the_regression_on_all_others(data, width, best):
    first, (features, labels) = parts(data)
    model = RandomRidge(DIM, width, 0)
    model.update(*first, 2)
    model.held_out_error = 1e9 * (torch.tensor(RIDGES) != best)  # this λ wins, whatever the second task adds
    scores = model.update_leaving_one_out(features, labels, ROWS)
    assert model.ridge == best
    hidden, targets = (data[0] @ model.projection).relu().double(), F.one_hot(data[1], ROWS).double()
    for image, answer in zip(torch.isin(data[1], torch.tensor([2, 3])).nonzero().flatten(), scores, strict=True):
        others = torch.arange(48) != image
        kernel = hidden[others] @ hidden[others].T + best * torch.eye(47)
        expected = hidden[image] @ hidden[others].T @ torch.linalg.solve(kernel, targets[others])
        torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)


def test_ridge_is_the_best_on_a_held_out_fifth_of_the_task(data):
    features, labels = parts(data)[0]  # 24 images
    model = RandomRidge(DIM, 40, seed=3)
    model.update(features, labels, 2)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    hidden = (features @ model.projection).relu().double()[order]
    targets = F.one_hot(labels, 2).double()[order]
    assert model.ridge == RIDGES[int(direct_errors(hidden[:19], targets[:19], hidden[19:], targets[19:]).argmin())]


@pytest.mark.parametrize("best", [1e-3, 1e2, 1e6])
def test_best_ridge_worked_by_hand(best):
    """One feature of 1 with target 1 is answered by 1 / (1 + λ); the held-out target is just that."""
    one = torch.ones(1, 1).double()
    assert RIDGES[int(ridge_path_errors(one, one, one, one / (1 + best)).argmin())] == best


def test_equal_images_with_unequal_labels_make_no_noise():
    """Their Gram matrix is singular: dividing by a λ far below its rounding would give anything."""
    fit = 1e4 * torch.rand(1, 30, generator=torch.Generator().manual_seed(0)).double().repeat(8, 1)
    targets = F.one_hot(torch.arange(8) % 2).double()
    errors = ridge_path_errors(fit, targets, fit[:2], targets[:2])
    assert errors[0] == pytest.approx(1, abs=0.05)  # both labels answered by one half: 4 · ½²


def test_ridges_are_the_papers_powers_of_ten():
    assert [f"{ridge:.0e}" for ridge in RIDGES] == [f"1e{power:+03d}" for power in range(-8, 10)]


def test_prediction_changes_nothing(data):
    """What is scored, test data above all, leaves no trace: neither in λ nor in any other number."""
    model, untouched = fitted(parts(data), 40), fitted(parts(data), 40)
    model.scores(100 * torch.randn(500, DIM))
    assert model.state_dict().keys() == untouched.state_dict().keys()
    assert all(torch.equal(v, untouched.state_dict()[k]) for k, v in model.state_dict().items())


def test_held_out_errors_of_all_tasks_are_added(data):
    """So λ does not hang on the newest task alone."""
    alone = [fitted([task], 40) for task in parts(data)]
    errors = fitted(parts(data), 40).held_out_error
    torch.testing.assert_close(errors, alone[0].held_out_error + alone[1].held_out_error)


def test_the_projection_comes_from_the_seed_alone(data):
    torch.manual_seed(5)
    first = RandomRidge(DIM, 40, seed=7)
    torch.manual_seed(6)
    assert torch.equal(first.projection, RandomRidge(DIM, 40, seed=7).projection)
    assert not torch.equal(first.projection, RandomRidge(DIM, 40, seed=8).projection)
    assert "projection" not in fitted(parts(data), 40).state_dict()


def test_the_relu_makes_a_non_linear_problem_solvable():
    angle = torch.linspace(0, 6.28, 200)
    features = torch.stack([angle.cos(), angle.sin()], dim=1)
    labels = (features[:, 0] * features[:, 1] > 0).long()  # opposite quadrants: no line separates them
    model = RandomRidge(2, 500, 0)
    model.update(features, labels, 2)
    assert (model.scores(features).argmax(dim=1) == labels).float().mean() > 0.97


@pytest.mark.parametrize("width", [1, 3, 400, 20])
@pytest.mark.parametrize(
    "features",
    [torch.zeros(6, DIM), torch.full((6, DIM), 0.1), torch.eye(6), 1e-15 * torch.eye(6), 1e8 * torch.eye(6)],
)
@pytest.mark.parametrize("kind", [RandomRidge, RidgePair])
def test_no_nan_in_hard_cases(kind, features, width):
    """Zero or equal features, one image in a class, one class or one image in a task."""
    model = kind(DIM, width, 0)
    model.update(features[:1], torch.tensor([0]), 1)
    model.update(features[1:3], torch.tensor([1, 1]), 2)
    model.update(features[3:], torch.tensor([2, 3, 2]), 4)
    assert all(values.isfinite().all() for values in model.state_dict().values())
    assert model.scores(torch.cat([features, torch.zeros(1, DIM)])).isfinite().all()


def test_one_image_a_task_is_learned():
    model = RandomRidge(DIM, 200, 0)
    for row, feature in enumerate(torch.eye(DIM)):
        model.update(feature[None], torch.tensor([row]), row + 1)
    assert model.scores(torch.eye(DIM)).argmax(dim=1).tolist() == list(range(DIM))


@pytest.mark.parametrize("width", [400, 20])
def test_rows_without_images_cannot_win(width):
    model = RandomRidge(DIM, width, 0)
    model.update(torch.ones(5, DIM), torch.tensor([1, 1, 3, 3, 1]), ROWS)
    scores = model.scores(-torch.ones(2, DIM))
    assert (scores[:, [0, 2]] == -torch.inf).all() and scores[:, [1, 3]].isfinite().all()
    assert RandomRidge(DIM, width, 0).scores(torch.ones(2, DIM)).shape == (2, 0)
    assert model.scores(torch.ones(0, DIM)).shape == (0, ROWS)


def test_before_the_first_task_it_holds_and_answers_nothing():
    model = RandomRidge(DIM, 8, 0)
    assert model.scores(torch.ones(3, DIM)).shape == (3, 0)
    empty = {name: tuple(value.shape) for name, value in model.state_dict().items() if not value.numel()}
    assert empty == {"images": (0,), "statistic": (0, 8), "statistic_targets": (0, 0), "weight": (8, 0)}


@pytest.mark.parametrize(("width", "rows"), [(96, 24), (95, 95)])
def test_up_to_a_quarter_of_the_width_in_images_the_root_is_kept(data, width, rows):
    first, _ = parts(data)
    assert len(first[1]) == 24
    assert fitted([first], width).statistic.shape == (rows, width)


def test_images_of_each_row_are_counted(data):
    assert fitted(parts(data), 20).images.tolist() == torch.bincount(data[1]).tolist()


def test_no_more_samples_than_a_batch_are_expanded_at_a_time(data, monkeypatch):
    model, sizes = fitted(parts(data), 20), []
    expand = model._expand
    monkeypatch.setattr(ridge, "PREDICT_BATCH", 20)
    monkeypatch.setattr(model, "_expand", lambda part: sizes.append(len(part)) or expand(part))
    model.scores(data[0])
    assert sum(sizes) == len(data[0]) > 20 and max(sizes) == 20


def test_many_samples_are_answered_as_one_by_one(data):
    model = fitted(parts(data), 40)
    many = data[0].repeat(50, 1)  # more than are expanded at a time
    torch.testing.assert_close(model.scores(many), model.scores(data[0]).repeat(50, 1))


@pytest.mark.parametrize("width", [400, 120, 20])
def test_state_round_trip_is_bit_exact_and_goes_on_alone(data, width):
    first, second = parts(data)
    original = fitted([first], width)
    copy = RandomRidge(DIM, width, 0)
    copy.load_state_dict(original.state_dict())
    before = original.scores(data[0])
    assert torch.equal(copy.scores(data[0]), before)
    copy.update(*second, ROWS)
    assert torch.equal(original.scores(data[0]), before)
    original.update(*second, ROWS)
    assert torch.equal(original.scores(data[0]), copy.scores(data[0]))


def test_a_gram_matrix_is_saved_by_its_lower_triangle_which_alone_is_read(data):
    width = 200  # more than a strip, and no multiple of one
    data = tuple(values.repeat(3, *[1] * (values.dim() - 1)) for values in data)  # images enough for Gram form
    first, second = parts(data)
    original = fitted([first], width)
    assert original.statistic.shape == (width, width)
    original.statistic += torch.ones(width, width, dtype=torch.float64).triu(1)
    saved = original.state_dict()
    assert saved["statistic"].numel() < 0.7 * width**2
    whole = {**saved, "statistic": original.statistic}  # as earlier versions saved it
    for state in (saved, whole):
        copy = RandomRidge(DIM, width, 0)
        copy.load_state_dict(state)
        assert torch.equal(copy.statistic.tril(), original.statistic.tril())
        assert (copy.statistic == copy.statistic.T).all() or state is whole
        copy.update(*second, ROWS)
        again = RandomRidge(DIM, width, 0)
        again.load_state_dict(whole)
        again.update(*second, ROWS)
        assert torch.equal(copy.weight, again.weight)


def test_a_feature_that_is_not_finite_is_refused():
    model = RandomRidge(DIM, 40, 0)
    features = torch.ones(4, DIM)
    features[3] = -torch.inf  # a ReLU alone would hide it
    with pytest.raises(NumericError, match="the first at 3"):
        model.update(features, torch.zeros(4, dtype=torch.long), 1)
    assert len(model.images) == 0
