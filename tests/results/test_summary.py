import pytest

from utils.results.run_log import best_order_free


def run(**last: float | None) -> dict:
    return {"results": {name: {"last": value} for name, value in last.items()}}


def test_the_summary_names_the_best_selection_that_looks_at_one_image_at_a_time():
    line = best_order_free(run(batch=99.0, batch_shuffled=98.0, sample=26.5, lda=44.25, ridge=43.0, oracle=97.0))
    assert line == (
        "Of the selections that look at one image at a time, lda is best: A_T 44.2, sample is 17.8 points below it"
    )


def test_sample_may_be_the_best():
    line = best_order_free(run(sample=60.0, ridges=50.0, blend=60.0, oracle=97.0))
    assert line == "Of the selections that look at one image at a time, sample is best: A_T 60.0"


@pytest.mark.parametrize("values", [{"sample": 50.0}, {}, {"sample": None, "lda": None}])
def test_nothing_is_said_where_there_is_nothing_to_compare(values):
    assert best_order_free(run(**values)) is None
