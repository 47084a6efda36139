"""Regular languages: automata and examples are as defined, and the automaton itself says what is right."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
from benchmarks.regbench.__main__ import main
from benchmarks.regbench.automata import (
    BAR,
    END,
    LETTERS,
    LONGEST,
    VOCABULARY,
    Automaton,
    allowed,
    draw_automata,
    draw_automaton,
    draw_examples,
    transitions,
)
from benchmarks.regbench.sweeps import SWEEPS
from benchmarks.regbench.task import Languages
from benchmarks.sweep.results import Results
from benchmarks.sweep.training import judge

CPU = torch.device("cpu")
AUTOMATA = draw_automata(300, 1)
EXAMPLES = draw_examples(AUTOMATA, torch.Generator().manual_seed(1))


def after(automaton: Automaton, word: list[int]) -> int | None:
    """The state after a word, None where the automaton does not accept it."""
    state: int | None = 0
    for letter in word:
        state = None if state is None else dict(automaton.edges[state]).get(letter)
    return state


def language(automaton: Automaton, start: int = 0, length: int = 6) -> frozenset[tuple[int, ...]]:
    """All accepted words up to a length."""
    words, ends = {()}, {((), start)}
    for _ in range(length):
        ends = {((*word, letter), to) for word, state in ends for letter, to in automaton.edges[state]}
        words |= {word for word, _ in ends}
    return frozenset(words)


def strings(tokens: list[int]) -> list[list[int]]:
    """The strings of an example."""
    whole = tokens[: tokens.index(END)] if END in tokens else tokens
    return [list(group) for is_bar, group in itertools.groupby(whole, BAR.__eq__) if not is_bar]


def test_automata_are_as_defined() -> None:
    sizes = set()
    for automaton in AUTOMATA:
        sizes.add(len(automaton.edges))
        for edges in automaton.edges:
            letters = [letter for letter, _ in edges]
            assert 1 <= len(edges) <= 3 and len(set(letters)) == len(letters)
            assert all(0 <= letter < LETTERS for letter in letters)
        reached = {0}
        for _ in automaton.edges:
            reached |= {to for state in reached for _, to in automaton.edges[state]}
        assert reached == set(range(len(automaton.edges)))  # trimmed
    assert max(sizes) == 12 and len(set(AUTOMATA)) == len(AUTOMATA)


def test_before_it_is_minimised_an_automaton_has_no_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Automaton, "minimised", lambda self: self)
    source = random.Random(0)
    sizes, alphabets, counts = set(), set(), set()
    for _ in range(500):
        edges = draw_automaton(source).edges
        sizes.add(len(edges))
        alphabets.add(len({letter for mine in edges for letter, _ in mine}))
        for state, mine in enumerate(edges):
            counts.add(len(mine))
            targets = [to for _, to in mine]
            assert state not in targets and len(set(targets)) == len(targets)
    assert sizes == set(range(4, 13)) and counts == {1, 2, 3} and max(alphabets) <= 18


def test_minimising_keeps_the_language_and_leaves_nothing_to_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    minimised = Automaton.minimised
    monkeypatch.setattr(Automaton, "minimised", lambda self: self)
    source = random.Random(3)
    for _ in range(100):
        raw = draw_automaton(source)
        least = minimised(raw)
        assert language(least) == language(raw)
        assert minimised(least) == least
        # Words as long as there are states tell any two apart.
        languages = [language(least, state, len(least.edges)) for state in range(min(5, len(least.edges)))]
        assert len(set(languages)) == len(languages)


def test_what_can_be_merged_is_merged_whatever_the_numbering() -> None:
    # States 1 and 2 behave alike, and 4 is never reached.
    one = Automaton((((0, 1), (1, 2)), ((2, 3),), ((2, 3),), ((0, 0),), ((5, 0),)))
    other = Automaton((((1, 3), (0, 2)), ((0, 0),), ((2, 1),), ((2, 1),)))
    assert one.minimised() == other.minimised() == Automaton((((0, 1), (1, 1)), ((2, 2),), ((0, 0),)))


def test_examples_are_strings_of_their_language() -> None:
    assert EXAMPLES.shape == (300, LONGEST)
    counts, lengths = [], []
    for automaton, tokens in zip(AUTOMATA, EXAMPLES.tolist(), strict=True):
        words = strings(tokens)
        assert all(after(automaton, word) is not None for word in words)
        used = sum(map(len, words)) + len(words) - 1  # a bar between, none at the end
        assert tokens[used:] == [END] * (LONGEST - used) and END not in tokens[:used]
        counts.append(len(words))
        lengths += map(len, words)
    assert set(counts) == set(range(10, 20)) and set(lengths) == set(range(1, 50))
    assert sum(counts) / len(counts) == pytest.approx(14.5, abs=0.6)
    assert sum(lengths) / len(lengths) == pytest.approx(25, abs=1)


def test_edges_are_taken_alike() -> None:
    automaton = Automaton((((3, 1), (5, 2), (9, 0)), ((3, 0),), ((3, 0), (7, 1))))
    tokens = draw_examples([automaton] * 400, torch.Generator().manual_seed(0))
    firsts = torch.tensor([word[0] for row in tokens.tolist() for word in strings(row)])
    shares = firsts.bincount(minlength=10) / len(firsts)
    torch.testing.assert_close(shares[[3, 5, 9]], torch.full((3,), 1 / 3), atol=0.03, rtol=0)


def test_the_automaton_says_what_may_come() -> None:
    tokens = EXAMPLES[:20, :400]
    may = allowed(transitions(AUTOMATA[:20]), tokens)
    for row, (automaton, line) in enumerate(zip(AUTOMATA, tokens.tolist(), strict=False)):
        word: list[int] = []
        for place, token in enumerate(line):
            word = [*word, token] if token < LETTERS else []
            state = after(automaton, word)
            assert state is not None
            assert set(may[row, place].nonzero().flatten().tolist()) == {letter for letter, _ in automaton.edges[state]}
    wrong = tokens.clone()
    wrong[0, 0] = next(letter for letter in range(LETTERS) if after(AUTOMATA[0], [letter]) is None)
    with pytest.raises(ValueError, match="not at place 0"):
        allowed(transitions(AUTOMATA[:20]), wrong)


def test_accuracy_counts_letters_that_the_automaton_allows() -> None:
    task = Languages(train=40, held_out=24, batch=8)
    data = task.data(CPU)
    automata = draw_automata(64, 0)[40:]
    tokens = draw_examples(draw_automata(64, 0), torch.Generator().manual_seed(0))[40:]
    batches = data.held_out()
    letters = sum(len(word) for row in tokens.tolist() for word in strings(row)) - len(tokens)
    assert sum(batch.weights.sum().item() for batch in batches) == letters  # the first token of each has no past
    for batch in batches:
        truth = torch.where(batch.answers < LETTERS, batch.answers, 0)
        right = judge(torch.stack((truth, torch.full_like(truth, BAR))), batch)
        counted = batch.weights > 0
        assert right[0, counted].all() and not right[1].any()
        # By hand, for a prediction that is the same letter everywhere.
        always = judge(torch.zeros(1, len(truth), dtype=torch.int64), batch)[0].view(batch.tokens.shape)
        for row, line in enumerate(batch.tokens.tolist()):
            number = next(i for i, full in enumerate(tokens.tolist()) if full[: len(line)] == line)
            word: list[int] = []
            for place, token in enumerate(line[:100]):
                word = [*word, token] if token < LETTERS else []
                assert always[row, place] == (after(automata[number], [*word, 0]) is not None)


def test_batches_hold_whole_examples_and_every_token_counts() -> None:
    data = Languages(train=40, held_out=8, batch=8).data(CPU)
    tokens = draw_examples(draw_automata(48, 0), torch.Generator().manual_seed(0))[:40].tolist()
    seen = set()
    for variant in range(4):
        batch = data.draw(variant, torch.Generator().manual_seed(0))
        assert batch.tokens.shape[1] % 16 == 0 and batch.answers.max() < VOCABULARY
        for line, answers, weights in zip(
            batch.tokens.tolist(), batch.answers.view(8, -1).tolist(), batch.weights.view(8, -1), strict=True
        ):
            whole = [line[0], *answers]
            number = next(
                i for i, full in enumerate(tokens) if (full + [END] * 99)[: len(whole)] == whole and END in whole
            )
            seen.add(number)
            assert line[1:] == answers[:-1]
            assert (weights > 0).tolist() == [answer != END for answer in answers]
        assert batch.weights.sum().item() == pytest.approx(1)
    assert len(seen) > 12
    assert {data.variant(step, 100) for step in range(100)} == {0, 1, 2, 3}
    assert [data.variant(step, 9) for step in range(9)] == [data.variant(step, 9) for step in range(9)]


def test_no_language_is_in_both_parts() -> None:
    automata = draw_automata(400, 0)
    assert not set(automata[:300]) & set(automata[300:])


def test_the_command_runs_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["--device", "cpu", "--out", str(tmp_path), "--slots", "8", "--seeds", "0"]
    assert main(command) == 0
    rows = Results(tmp_path / "cpu.jsonl").rows
    assert {row["family"].split(",")[0] for row in rows} == {"fejer", "sliding"}
    assert all(0 < row["accuracy"] < 1 and row["setting"]["task"]["kind"] == "Languages" for row in rows)
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out.count("already there") == 2


@pytest.mark.parametrize("name", SWEEPS)
def test_points_of_a_sweep_differ(name: str) -> None:
    sweep = SWEEPS[name]
    assert len({(point.family, point.shape.mixer.slots) for point in sweep.points}) == len(sweep.points)
