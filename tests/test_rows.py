"""Rows: captured tokens in memory and in shards, read in any order."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_hooks.errors import HookError, UnknownHookError
from mlx_hooks.storage import rows as rows_module
from mlx_hooks.storage import shards
from mlx_hooks.storage.rows import ArrayRows, RowPart
from mlx_hooks.storage.shards import ShardReader, ShardWriter

LAYERS = {
    "blocks.0.hook_resid_post": {"axes": ["d_model"], "shape": [3], "dtype": "bfloat16", "asked": "model.layers.0"},
    "blocks.1.attn.hook_pattern": {"axes": ["head", "key"], "shape": [2, 0], "dtype": "float32"},
}


def written(folder: Path, max_rows: int = 4) -> tuple[np.ndarray, ShardReader]:
    """Two steps of 6 and 3 rows, whose patterns have 6 and 3 keys; and the stream's values [row, 3]."""
    writer = ShardWriter(folder, layers=LAYERS, max_rows=max_rows)
    values = []
    for step, n in ((0, 6), (10, 3)):
        stream = mx.random.normal((n, 3)).astype(mx.bfloat16)
        values.append(np.array(stream.astype(mx.float32)))
        pattern = mx.full((n, 2, n), step + 1.0)
        columns = {"tokens": np.arange(n) + 100, "sequence": np.arange(n) // 3, "position": np.arange(n) % 3}
        writer.write(dict(zip(LAYERS, (stream, pattern), strict=True)), step=step, **columns)
    writer.close()
    return np.concatenate(values), ShardReader(folder)


def test_rows_of_shards_are_what_was_written(tmp_path: Path) -> None:
    values, reader = written(tmp_path)
    rows = reader.rows(0)
    assert [entry["rows"] for entry in reader.entries] == [4, 2, 3]
    assert (len(rows), rows.shape, rows.name) == (9, (3,), "blocks.0.hook_resid_post")
    order = np.array([8, 0, 5, 3])
    part = rows.take(order)
    np.testing.assert_array_equal(part.values, values[order])
    assert part.tokens is not None
    assert part.step is not None
    assert part.tokens.tolist() == [102, 100, 105, 103]
    assert part.step.tolist() == [10, 0, 0, 0]
    np.testing.assert_array_equal(np.concatenate([p.values for p in rows.parts(2)]), values)
    np.testing.assert_array_equal(reader.rows("model.layers.0", steps=[10]).sample(9).values, values[6:])


@pytest.mark.parametrize("indices", [[9], [-1], [0, 9]])
def test_rows_that_there_are_not(indices: list[int], tmp_path: Path) -> None:
    with pytest.raises(IndexError, match="rows are 0 to 8"):
        written(tmp_path)[1].rows(0).take(indices)


def test_patterns_of_shorter_batches_are_padded(tmp_path: Path) -> None:
    rows = written(tmp_path)[1].rows("blocks.1.attn.hook_pattern")
    assert rows.shape == (2, 6)
    last = rows.take([8]).values.reshape(2, 6)
    np.testing.assert_array_equal(last, [[11, 11, 11, 0, 0, 0]] * 2)


def test_each_epoch_shows_every_row_once_in_another_order(tmp_path: Path) -> None:
    values, reader = written(tmp_path)
    batches = list(reader.rows(0).shuffled(4, seed=3, epochs=2))
    assert [len(batch) for batch in batches] == [4, 4, 1, 4, 4, 1]
    first, second = np.concatenate(batches[:3]), np.concatenate(batches[3:])
    assert sorted(map(tuple, first)) == sorted(map(tuple, second)) == sorted(map(tuple, values))
    assert not np.array_equal(first, second)


def test_random_order_is_the_permutation_s_whatever_is_read_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, reader = written(tmp_path)
    generator = np.random.default_rng(3)
    expected = np.concatenate([values[generator.permutation(9)] for _ in range(2)])
    for ahead_rows, ahead_bytes in ((8192, 2**20), (4, 2**20), (8192, 4 * 3 * 7), (1, 1)):
        monkeypatch.setattr(rows_module, "_AHEAD_ROWS", ahead_rows)
        monkeypatch.setattr(rows_module, "_AHEAD_BYTES", ahead_bytes)
        batches = list(reader.rows(0).shuffled(2, seed=3, epochs=2))
        assert [len(batch) for batch in batches] == [2, 2, 2, 2, 1] * 2
        np.testing.assert_array_equal(np.concatenate(batches), expected)


def test_random_order_opens_each_file_once_for_many_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    shard = shards.Shard
    monkeypatch.setattr(shards, "_MOST_OPEN", 1)
    monkeypatch.setattr(shards, "Shard", lambda path, entry: (opened.append(path), shard(path, entry))[1])
    assert len(list(written(tmp_path, max_rows=1)[1].rows(0).shuffled(2))) == 5
    assert len(opened) == 9


@pytest.mark.parametrize("label", ["session", "rank", "step", "sequence"])
def test_sequences_differ_in_any_of_what_tells_them_apart(label: str) -> None:
    labels = {name: np.zeros(3, np.int32) for name in ("session", "rank", "step", "sequence")}
    labels[label] = np.array([0, 1, 1])
    sequences = RowPart(np.zeros((3, 1)), **labels).sequences
    assert sequences is not None
    assert sequences.tolist() == [0, 1, 1]


def test_sequences_are_told_apart_across_steps(tmp_path: Path) -> None:
    sequences = written(tmp_path)[1].rows(0).sample(9).sequences
    assert sequences is not None
    assert len(set(sequences[:3])) == 1
    assert len(set(sequences)) == 3


@pytest.mark.parametrize("asked", ["model.layers.0", "transformer.h.0", "0", 0, "blocks.0.hook_resid_post"])
def test_layers_are_found_by_all_their_names(asked: str | int, tmp_path: Path) -> None:
    assert written(tmp_path)[1].layer_name(asked) == "blocks.0.hook_resid_post"


@pytest.mark.parametrize("asked", ["model.layers.7", 1, "nonsense"])
def test_a_layer_that_was_not_captured_is_refused(asked: str | int, tmp_path: Path) -> None:
    with pytest.raises(UnknownHookError, match=r"was not captured\. There are: blocks\.0\.hook_resid_post, "):
        written(tmp_path)[1].rows(asked)


def test_a_step_that_was_not_captured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HookError, match=r"Step 5 was not captured\. Steps: 0, 10\."):
        written(tmp_path)[1].rows(0, steps=[5])


@pytest.mark.parametrize(
    ("values", "labels", "said"),
    [
        (np.zeros(3), {}, "array of numbers"),
        (np.zeros((0, 3)), {}, "array of numbers"),
        (np.array([["a"]]), {}, "array of numbers"),
        (np.zeros((2, 3), complex), {}, "complex"),
        (np.zeros((2, 3)), {"tokens": [1]}, "one number per row"),
        (np.zeros((2, 3)), {"token": [1, 2]}, "There are: tokens"),
    ],
)
def test_what_are_no_rows_is_refused(values: np.ndarray, labels: dict, said: str) -> None:
    with pytest.raises(HookError, match=said):
        ArrayRows(values, **labels)


def test_rows_in_memory_have_one_width() -> None:
    values = np.arange(24).reshape(4, 2, 3)
    rows = ArrayRows(values, "x", tokens=[5, 6, 7, 8])
    assert (rows.shape, rows.width, len(rows)) == ((2, 3), 6, 4)
    part = rows.take([3, 0])
    assert part.tokens is not None
    assert part.values.dtype == np.float32
    np.testing.assert_array_equal(part.values, values.reshape(4, 6)[[3, 0]])
    assert (part.tokens.tolist(), part.sequences) == ([8, 5], None)


def test_a_text_that_is_read_again_is_the_same_text() -> None:
    columns = {
        "tokens": [5, 6, 7, 5, 6, 7, 5, 6, 7, 8, 5, 6, 7],
        "position": [0, 1, 2, 0, 1, 2, 2, 1, 0, 3, 1, 2, 3],
        "sequence": [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1],
        "step": [0, 0, 0, 0, 0, 0, 9, 9, 9, 9, 9, 9, 9],
    }
    zeros = {"rank": [0] * 13, "session": [0] * 13}
    part = ArrayRows(np.zeros((13, 1)), **columns, **zeros).sample(13)
    assert part.texts is not None
    assert part.texts.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert ArrayRows(np.zeros((2, 1)), tokens=[1, 2]).sample(2).texts is None


def test_rows_that_read_the_same_from_the_start_are_known() -> None:
    generator = np.random.default_rng(0)
    texts = [[0, *generator.integers(0, 3, size=generator.integers(1, 6))] for _ in range(40)]
    texts += [text[: generator.integers(1, len(text) + 1)] for text in texts]
    columns: dict[str, list[int]] = {"tokens": [], "sequence": [], "position": []}
    for i, text in enumerate(texts):
        for position, token in enumerate(text):
            for name, value in (("tokens", token), ("sequence", i), ("position", position)):
                columns[name].append(int(value))
    n = len(columns["tokens"])
    order = generator.permutation(n)
    known = {name: np.array(column)[order] for name, column in columns.items()}
    zeros = {name: np.zeros(n) for name in ("step", "rank", "session")}
    prefixes = ArrayRows(np.zeros((n, 1)), **known, **zeros).sample(n).prefixes
    expected = [tuple(texts[columns["sequence"][row]][: columns["position"][row] + 1]) for row in order]
    assert prefixes is not None
    names: dict[tuple, int] = {}
    for number, prefix in zip(prefixes.tolist(), expected, strict=True):
        assert names.setdefault(prefix, number) == number
    assert len(set(names.values())) == len(names)
    # Of what does not begin at 0, the text is all that is known.
    known["position"] = known["position"] + 1
    later = ArrayRows(np.zeros((n, 1)), **known, **zeros).sample(n)
    assert later.prefixes is not None
    assert later.texts is not None
    places = np.unique(np.stack([later.texts, known["position"]]), axis=1).shape[1]
    assert len(set(later.prefixes.tolist())) == places
