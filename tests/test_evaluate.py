"""Video-MME over a tiny model: what is read, resumed and scored."""

import json
import shutil

import pytest
import tiny_lm
from typer.testing import CliRunner

import psa
from psa import evaluate as room
from psa import understand
from psa.clips import CLIP
from psa.commands.evaluate import evaluate as app

OPTIONS = ["A. One", "B. Two", "C. Three", "D. Four"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_lm.save_qwen_folder(tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def data(tmp_path):
    (tmp_path / "videos").mkdir()
    rows = []
    for i, duration in enumerate(("short", "short", "long")):
        shutil.copy(CLIP, tmp_path / "videos" / f"v{i}.mp4")
        row = {"question_id": f"{i}-1", "videoID": f"v{i}", "duration": duration, "question": "How many?"}
        rows.append({**row, "options": OPTIONS, "answer": "ABC"[i]})
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("(c) because", "C"), ("D. Four", "D"), ("The best answer is: B.", "B"), ("Answer: A", "A"),
        ("A dog runs", "A"), ("It is C", "C"), ("no idea", None), ("", None), ("Because", None),
    ],
)  # fmt: skip
def test_choice(text, letter):
    assert room.choice(text) == letter


def test_questions_and_their_errors(data, tmp_path):
    questions = room.read_questions(data)
    assert [q.duration for q in questions] == ["short", "short", "long"] and questions[0].video.name == "v0.mp4"
    assert questions[1].prompt.count("\n") == 6 and "B. Two" in questions[1].prompt
    rows = [json.loads(line) for line in (data / "questions.jsonl").read_text().splitlines()]
    for change, message in (({"videoID": "gone"}, "gone"), ({"answer": None}, "answer"), ({"answer": "7"}, "letter")):
        (data / "questions.jsonl").write_text(json.dumps({**rows[0], **change}))
        with pytest.raises(psa.PSAError, match=message) as caught:
            room.read_questions(data)
        assert "question 1" in str(caught.value)
    for text in ("{", ""):
        (data / "questions.jsonl").write_text(text)
        with pytest.raises(psa.PSAError):
            room.read_questions(data)
    (data / "questions.jsonl").unlink()
    for place in (data, data / "nowhere"):
        with pytest.raises(psa.PSAError):
            room.read_questions(place)
    (data / "questions.json").write_text(json.dumps(rows))
    assert len(room.read_questions(data)) == 3


def test_rows_are_resumed_and_scored(folder, data, monkeypatch):
    loaded, questions = understand.load(str(folder), device="cpu"), room.read_questions(data)
    record, call = data / "out" / "rows.jsonl", {"frames": 8, "density": 0.4, "min_queries": 64}
    asked = []
    original = room.answer
    monkeypatch.setattr(room, "answer", lambda *a, **k: asked.append(k["use_psa"]) or original(*a, **k))
    first = room.evaluate(loaded, questions[:2], record, **call)
    assert asked == [False, True] * 2 and len(room.read_rows(record)) == 4
    assert first[1]["density"] < 1 and first[0]["density"] is None and {"text", "choice", "correct"} <= set(first[0])
    with record.open("a") as file:
        file.write('{"question_id": "cut sho')
    rows = room.evaluate(loaded, questions, record, **call)
    assert len(asked) == 6 and len(rows) == 6 and rows[:4] == first
    room.evaluate(loaded, questions, record, **{**call, "density": 0.5})
    assert len(asked) == 9, "dense rows are kept, those of other settings are not"
    table = room.summary([{**row, "correct": row["duration"] == "short"} for row in rows])
    assert [(s["mode"], s["duration"], s["accuracy"]) for s in table if s["mode"] == "psa"] == [
        ("psa", "short", 1.0),
        ("psa", "long", 0.0),
        ("psa", "all", pytest.approx(2 / 3)),
    ]


def test_unreadable_videos_count_as_wrong_and_are_tried_again(folder, data):
    loaded = understand.load(str(folder), device="cpu")
    (data / "videos" / "v0.mp4").write_text("broken")
    questions, record = room.read_questions(data)[:1], data / "rows.jsonl"
    rows = room.evaluate(loaded, questions, record, modes=("dense",), frames=4)
    assert "cannot be read" in rows[0]["error"] and not rows[0]["correct"]
    shutil.copy(CLIP, data / "videos" / "v0.mp4")
    assert "error" not in room.evaluate(loaded, questions, record, modes=("dense",), frames=4)[0]


def test_command(folder, data):
    call = ["video-mme", "--data", data, "--model", folder, "--frames", 6, "--output", data / "r.jsonl"]
    done = CliRunner().invoke(app, [str(x) for x in [*call, "--density", 0.4, "--json"]])
    assert done.exit_code == 0, done.output
    scores = json.loads(done.stdout)["scores"]
    assert {(s["mode"], s["duration"]) for s in scores} >= {("dense", "short"), ("psa", "long"), ("psa", "all")}
    done = CliRunner().invoke(app, [str(x) for x in [*call, "--mode", "dense", "--limit", 1]])
    assert done.exit_code == 0 and "accuracy" in done.output
    for extra in (["--mode", "x"], ["--duration", "x"], ["--mode", "dense", "--density", 0.3]):
        done = CliRunner().invoke(app, [str(x) for x in [*call, *extra]])
        assert isinstance(done.exception, psa.PSAError), done.output
