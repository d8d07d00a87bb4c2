"""A value read off log-probabilities: the arithmetic, and what is refused."""

import math

import pytest

import dendrite as dd
from dendrite.dsl.choice import Normalize, Read

LOGPROBS = [[-1.0, -1.0], [-1.5], [-4.0, -1.0, -1.0]]
NEUTRAL = [[-1.0, -0.5], [-3.0], [-4.5, -1.0, -1.0]]


def softmax(totals: list[float]) -> list[float]:
    masses = [math.exp(total) for total in totals]
    return [mass / sum(masses) for mass in masses]


@pytest.mark.parametrize(
    "normalize, totals",
    [("sum", [-2.0, -1.5, -6.0]), ("mean", [-1.0, -1.5, -2.0]), ("unconditional", [-0.5, 1.5, 0.5])],
)
def test_normalisations(normalize: Normalize, totals: list[float]) -> None:
    """Each compares the labels by its own totals."""
    choice = dd.Choice({"a b": 2.0, "c": 1.0, "d e f": 0.0}, "?", normalize=normalize)
    assert choice.probabilities(LOGPROBS, NEUTRAL) == pytest.approx(softmax(totals))


@pytest.mark.parametrize("read, value", [("expected", None), ("argmax", 2.0)])
def test_readings(read: Read, value: float | None) -> None:
    """The expected worth, or that of the likeliest label."""
    choice = dd.Choice({"a b": 2.0, "c": 1.0, "d e f": 0.0}, "?", read=read)
    first, second, _ = softmax([-1.0, -1.5, -2.0])
    assert choice.reading(LOGPROBS) == pytest.approx(2 * first + second if value is None else value)


def test_very_unlikely_labels_still_compare() -> None:
    """Totals far below zero do not underflow."""
    choice = dd.Choice(["a", "b"], "?", normalize="sum")
    assert choice.reading([[-5000.0], [-5001.0]]) == pytest.approx(1 / (1 + math.exp(-1)))


def test_a_list_of_labels_counts_down_evenly() -> None:
    """The first is worth 1, the last 0."""
    assert dd.Choice(["yes", "no"]).labels == {"yes": 1.0, "no": 0.0}
    assert dd.Choice(["good", "fair", "bad"]).labels == {"good": 1.0, "fair": 0.5, "bad": 0.0}
    assert dd.Choice(["yes"]).labels == {"yes": 1.0}


@pytest.mark.parametrize(
    "choice, transcript, labels",
    [
        (dd.Choice(["yes"], "\nGood?"), "…", [" yes"]),
        (dd.Choice(["yes"], "\nGood: "), "…", ["yes"]),
        (dd.Choice([" yes"], "\nGood?"), "…", [" yes"]),
        (dd.Choice(["yes"]), "It is:", [" yes"]),
        (dd.Choice(["yes"]), "It is:\n", ["yes"]),
        (dd.Choice(["yes"], "Good?", fresh=True), "…", ["yes"]),
        (dd.Choice(["yes"], [{"role": "user", "content": "Good?"}]), "…", ["yes"]),
    ],
)
def test_labels_continue_what_stands_before_them(choice: dd.Choice, transcript: str, labels: list[str]) -> None:
    """A space comes between where the text before needs one; an assistant's turn begins without."""
    assert choice.continuations(transcript) == labels


@pytest.mark.parametrize(
    "make, complaint",
    [
        (lambda: dd.Choice([]), "needs labels"),
        (lambda: dd.Choice({}), "needs labels"),
        (lambda: dd.Choice("yes"), "needs labels"),
        (lambda: dd.Choice(["yes", " "]), "is empty"),
        (lambda: dd.Choice(["yes", "yes"]), "twice"),
        (lambda: dd.Choice({"yes": float("nan")}), "finite"),
        (lambda: dd.Choice(["yes"], fresh=True), "needs a question"),
        (lambda: dd.Choice(["yes"], normalize="unconditional"), "needs a question"),
        (lambda: dd.Choice(["yes"], "?", fresh=True, normalize="unconditional"), "mean"),
        (lambda: dd.Choice(["yes"], "?", normalize="median"), "unconditional"),  # type: ignore[arg-type]  # on purpose
        (lambda: dd.Choice(["yes"], "?", read="worst"), "argmax"),  # type: ignore[arg-type]  # on purpose
    ],
)
def test_choices_that_cannot_be_read_are_refused(make: object, complaint: str) -> None:
    """At construction, with what to do instead."""
    assert callable(make)
    with pytest.raises(dd.ProgramError, match=complaint):
        make()
