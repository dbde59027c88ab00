import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_py import InputError, PackageError, Session
from runtime_py.package import fingerprint


def test_a_folder_and_its_file_open_the_same_model(package, session):
    assert Session(package / "model.onnx").fingerprint == session.fingerprint
    assert session.config.eos_token_ids == (257, 256)


@pytest.mark.parametrize("what", ["nothing", "folder", "noise", "empty"])
def test_what_is_no_model_is_refused_in_one_line(tmp_path, what):
    path = tmp_path / what
    if what == "folder":
        path.mkdir()
    elif what != "nothing":
        path.write_bytes(b"\x93no model" * (what == "noise"))
    with pytest.raises(PackageError) as error:
        Session(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, "no sambay.version"),
        ({"sambay.version": "2"}, "'2'"),
        ({"sambay.version": "1"}, "sambay.config"),
        ({"sambay.version": "1", "sambay.config": "{}", "sambay.logits": "last"}, "vocab_size"),
        ({"sambay.version": "1", "sambay.config": "[", "sambay.logits": "last"}, "incomplete"),
    ],
)
def test_a_model_that_is_not_ours_is_refused(tmp_path, model_file, metadata, said):
    with pytest.raises(PackageError, match=said):
        Session(model_file(tmp_path / "model.onnx", metadata=metadata))


def test_a_state_that_would_be_lost_is_refused(tmp_path, model_file):
    path = model_file(tmp_path / "model.onnx")
    model = onnx.load(path)
    del model.graph.output[-1]
    onnx.save(model, path)
    with pytest.raises(PackageError, match=r"no output 'present\.0\.value'"):
        Session(path)


@pytest.mark.parametrize("axis", ["heads", ""])
def test_a_state_of_unknown_size_is_refused(tmp_path, model_file, axis):
    path = model_file(tmp_path / "model.onnx")
    model = onnx.load(path)
    model.graph.input[-1].type.tensor_type.shape.dim[1].dim_param = axis
    onnx.save(model, path)
    with pytest.raises(PackageError, match=r"past_key_values\.0\.value"):
        Session(path)


@pytest.mark.parametrize(
    "wrong", [{"threads": 0}, {"threads": 99_999}, {"providers": ["AbacusProvider"]}], ids=str
)
def test_threads_and_providers_that_cannot_be_had_are_refused(package, wrong):
    with pytest.raises(InputError, match=r"threads|AbacusProvider"):
        Session(package, **wrong)


def test_the_fingerprint_tells_weights_apart(tmp_path):
    path, data = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    path.write_bytes(b"graph")
    weights = np.zeros(40_000_000, np.uint8)  # more than is read whole
    data.write_bytes(weights)
    before = fingerprint(path)
    data.write_bytes(weights + np.uint8(1))
    assert fingerprint(path) != before


@settings(max_examples=40)
@given(
    ids=st.lists(st.integers(0, 255), min_size=1, max_size=40),
    cuts=st.sets(st.integers(1, 39)),
    chunk=st.integers(1, 50),
)
def test_a_text_in_pieces_gives_the_logits_of_the_whole(session, expected, ids, cuts, chunk):
    session.chunk, sequence = chunk, session.start()
    for piece in np.split(ids, sorted(cut for cut in cuts if cut < len(ids))):
        logits = sequence.step(piece)
    session.chunk = 512
    np.testing.assert_array_equal(logits, session.start().step(ids))
    assert logits.shape == (1, session.config.vocab_size)
    assert logits.dtype == np.float32
    assert logits.max() == expected(ids)
    assert sequence.length == len(ids)


rows = st.lists(
    st.lists(st.lists(st.integers(0, 255), min_size=0, max_size=6), min_size=2, max_size=2),
    min_size=1,
    max_size=4,
).filter(lambda calls: all(calls[0]))


@settings(max_examples=40)
@given(calls=rows, chunk=st.integers(1, 7), data=st.data())
def test_each_padded_row_equals_the_row_alone(session, calls, chunk, data):
    """Padding on the left, on the right and between, across calls and chunks."""
    session.chunk, sequence = chunk, session.start(batch=2)
    alone = [session.start(), session.start()]
    wanted: list = [None, None]
    for texts in calls:
        width = max(1, *map(len, texts))
        ids, mask = np.full((2, width), -100), np.zeros((2, width), int)
        for row, text in enumerate(texts):
            places = data.draw(st.permutations(range(width)))[: len(text)]
            ids[row, sorted(places)], mask[row, sorted(places)] = text, 1
            if text:
                wanted[row] = alone[row].step(text)[0]
        np.testing.assert_array_equal(sequence.step(ids, mask), wanted)
    session.chunk = 512


def test_growing_keeps_what_was_fed_and_every_new_slot_is_zero(session, expected):
    sequence, ids = session.start(), [index % 3 for index in range(700)]
    for start in range(0, 700, 100):
        logits = sequence.step(ids[start : start + 100])
    assert logits.max() == expected(ids)
    key = sequence._buffers.arrays[2][0, 0, :, 0]
    assert key[:700].tolist() == ids
    assert not key[700:].any()


@pytest.mark.parametrize("used", ["steps", "fork", "growth"])
def test_states_stay_in_the_memory_that_is_bound(session, used):
    sequence = session.start()
    sequence.step([1])
    before = [array.ctypes.data for array in sequence._buffers.arrays]
    if used == "fork":
        sequence.fork().step([1])
    sequence.step([1] * (300 if used == "growth" else 1))
    same = [
        array.ctypes.data == old
        for array, old in zip(sequence._buffers.arrays, before, strict=True)
    ]
    assert same == [True, True, used != "growth", True]


def test_a_fork_and_its_origin_go_their_own_ways(session, expected):
    sequence = session.start()
    sequence.step([5, 6])
    fork = sequence.fork()
    np.testing.assert_array_equal(fork.logits, sequence.logits)
    assert fork.step([7, 8]).max() == expected([5, 6, 7, 8])
    assert sequence.length == 2
    assert sequence.step([9]).max() == expected([5, 6, 9])
    assert fork.step([1]).max() == expected([5, 6, 7, 8, 1])


def test_returned_logits_are_the_callers(session):
    sequence = session.start()
    sequence.step([1])[:] = 0
    assert sequence.logits.any()


def test_progress_is_told_before_and_after_each_chunk(session):
    told = []
    session.start().step([1] * 1200, progress=lambda *place: told.append(place))
    assert told == [(0, 1200), (512, 1200), (1024, 1200), (1200, 1200)]


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([], "empty"),
        (np.zeros((1, 0), int), "empty"),
        ([1, 2, 999, -1], r"999 \(row 0, token 2\)"),
        ([3, -1], r"-1 \(row 0, token 1\)"),
        ([[1], [2]], r"\[2, 1\]"),
        (7, r"\[\]"),
        ([1.5], "float64"),
        ([[1, 2], [3]], "rectangle"),
        (["a"], "expected integers"),
        ([2**63], "outside|integers"),
    ],
    ids=str,
)
def test_ids_that_cannot_be_fed_are_refused_before_anything_runs(session, ids, said):
    sequence = session.start()
    with pytest.raises(InputError, match=said):
        sequence.step(ids)
    assert sequence.length == 0


@pytest.mark.parametrize(
    ("mask", "said"), [([[1]], "shape"), ([[2, 1]], "0 and 1"), ([[0, 0]], "row 0 has no token")]
)
def test_a_mask_that_cannot_be_used_is_refused(session, mask, said):
    with pytest.raises(InputError, match=said):
        session.start().step([1, 2], mask)


def test_a_batch_below_one_is_refused(session):
    with pytest.raises(InputError, match="batch"):
        session.start(batch=0)


def test_beyond_the_context_a_sequence_warns_once_and_beyond_the_limit_it_refuses(session, recwarn):
    sequence = session.start()
    sequence.step([0] * 2000)
    assert not recwarn
    with pytest.warns(UserWarning, match="2001 tokens"):
        sequence.step([0])
    sequence.step([0] * 999)
    assert not recwarn
    with pytest.raises(InputError, match="3000 tokens and 1 more"):
        sequence.step([0])
    assert sequence.length == 3000


class _StubModel:
    """The model, with Ctrl-C pressed at a certain run, before or after it."""

    def __init__(self, model, at, after):
        self.model, self.left, self.after = model, at, after

    def run_with_iobinding(self, binding):
        self.left -= 1
        if self.left == 0 and not self.after:
            raise KeyboardInterrupt
        self.model.run_with_iobinding(binding)
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interruption_leaves_whole_chunks(package, expected, at, after):
    session = Session(package, threads=1)
    sequence, ids = session.start(), [index % 2 for index in range(1300)]
    real, session.model = session.model, _StubModel(session.model, at, after)
    with pytest.raises(KeyboardInterrupt):
        sequence.step(ids)
    session.model = real
    assert sequence.length == min(512 * (at - (not after)), 1300)
    if sequence.length < 1300:
        sequence.step(ids[sequence.length :])
    assert sequence.logits.max() == expected(ids)


def test_a_failed_run_breaks_its_sequence_for_good(package):
    session = Session(package, threads=1)
    sequence = session.start()
    sequence._buffers.binding.clear_binding_inputs()
    for act in (lambda: sequence.step([1]), sequence.fork, lambda: sequence.length):
        with pytest.raises(RuntimeError, match="start a new sequence"):
            act()
    assert session.start().step([1]).any()


def test_all_logits_are_those_of_each_token(make_session):
    session = make_session(all_logits=True)
    session.chunk = 2
    ids, mask = [[9, 1, 2, 3, 4], [5, 6, 9, 9, 7]], [[0, 1, 1, 1, 1], [1, 1, 0, 0, 1]]
    sequence = session.start(batch=2)
    logits = sequence.step_all(ids, mask)
    assert logits.shape == (2, 5, session.config.vocab_size)
    assert logits[0].argmax(-1).tolist() == [0, 2, 3, 4, 5]  # what follows each; 0 for padding
    assert logits[1].argmax(-1).tolist() == [6, 7, 0, 0, 8]
    np.testing.assert_array_equal(sequence.logits.argmax(-1), [5, 8])
    np.testing.assert_array_equal(session.start(2).step(ids, mask), sequence.logits)


def test_all_logits_of_a_model_of_the_last_token_are_refused(session):
    with pytest.raises(InputError, match="--all-logits"):
        session.start().step_all([1])
