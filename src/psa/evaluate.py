"""Benchmarks for those who have their data and weights. So far Video-MME: multiple choice over short and long videos.

A data folder holds the questions and the videos:

    DIR/questions.jsonl        (or .json, .csv, or .parquet where pandas is installed; also under DIR/videomme/)
    DIR/videos/<videoID>.mp4   (or .mkv, .webm; also under DIR/data/)

Each question has the fields of the published set: ``question_id``, ``videoID`` (or ``video_id``), ``duration`` (short,
medium or long), ``question``, ``options`` (a list of four, "A. …") and ``answer`` (a letter).
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import PSAError
from .understand import Answer, Loaded, Vision, answer, look

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")
DURATIONS = ("short", "medium", "long")
PROMPT = (
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option.\n{question}\n{options}\nThe best answer is:"
)


@dataclass(frozen=True)
class Question:
    """One question of Video-MME."""

    id: str
    video: Path
    duration: str
    question: str
    options: tuple[str, ...]
    answer: str

    @property
    def prompt(self) -> str:
        return PROMPT.format(question=self.question, options="\n".join(self.options))


def read_questions(folder: str | Path) -> list[Question]:
    """The questions of a data folder, in its order.

    Raises:
        PSAError: one line naming the file, the question and the field that is wrong or missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PSAError(f"{folder}: no such folder")
    names = ("questions.jsonl", "questions.json", "questions.csv", "questions.parquet")
    found = [place / name for place in (folder, folder / "videomme") for name in names if (place / name).is_file()]
    found += sorted((folder / "videomme").glob("*.parquet")) if not found else []
    if not found:
        raise PSAError(f"{folder}: no questions ({', '.join(names)})")
    videos = {p.stem: p for place in ("videos", "data", ".") for p in _videos(folder / place)}
    questions = [_question(found[0], i, row, videos, folder) for i, row in enumerate(_rows(found[0]))]
    if not questions:
        raise PSAError(f"{found[0]}: holds no questions")
    return questions


def _videos(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (p for p in sorted(folder.iterdir()) if p.suffix.lower() in VIDEO_SUFFIXES)


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        if path.suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as file:
                return list(csv.DictReader(file))
        import pandas

        return pandas.read_parquet(path).to_dict("records")
    except ImportError as error:
        raise PSAError(f"{path}: reading it needs pandas and pyarrow: pip install pandas pyarrow") from error
    except (OSError, ValueError) as error:
        raise PSAError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error


def _question(path: Path, index: int, row: dict[str, Any], videos: dict[str, Path], folder: Path) -> Question:
    where = f"{path}: question {index + 1}"
    if not isinstance(row, dict):
        raise PSAError(f"{where}: expected a mapping, got {type(row).__name__}")
    name = str(row.get("videoID") or row.get("video_id") or "")
    missing = [key for key in ("question", "options", "answer") if row.get(key) is None]
    if missing or not name:
        raise PSAError(f"{where}: {missing[0] if missing else 'videoID'} is missing")
    if name not in videos:
        raise PSAError(f"{where}: video {name} is not in {folder}/videos ({', '.join(VIDEO_SUFFIXES)})")
    options = row["options"]
    if isinstance(options, str):
        options = [line.strip() for line in options.strip("[]").splitlines() if line.strip()]
    letter = str(row["answer"]).strip().upper()[:1]
    if letter not in "ABCDEFGH" or not letter:
        raise PSAError(f"{where}: answer {row['answer']!r} is not a letter")
    duration = str(row.get("duration", "short")).lower()
    key = str(row.get("question_id", index))
    return Question(key, videos[name], duration, str(row["question"]), tuple(map(str, options)), letter)


def choice(text: str) -> str | None:
    """The letter that an answer chooses: ``"B"``, ``"(b) because"``, ``"The best answer is: B."``; None without one."""
    stripped = text.strip()
    first = re.match(r"^\W*([A-Ha-h])(?:\W|$)", stripped)
    if first:
        return first.group(1).upper()
    named = re.search(r"(?:answer|option|choice)\W+(?:is\W+)?([A-H])\b", stripped, re.IGNORECASE)
    alone = named or re.search(r"\b([B-H])\b", stripped)
    return alone.group(1).upper() if alone else None


# -- running ---------------------------------------------------------------------------------------------------------


def evaluate(
    loaded: Loaded,
    questions: Iterable[Question],
    output: str | Path,
    *,
    modes: tuple[str, ...] = ("dense", "psa"),
    frames: int | None = None,
    fps: float | None = None,
    max_pixels: int | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Answers every question in every mode and appends one JSON row for each to ``output``.

    Resumable: rows that ``output`` holds already, of the same model, mode and settings, are not asked again. A video
    that cannot be read gives a row with ``error`` and no answer, which counts as wrong and is tried again next time.

    Args:
        settings: of :func:`psa.understand.answer` with ``use_psa``: preset, config, density, …

    Returns:
        Every row of this evaluation, old and new.
    """
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    config = settings.get("config")
    sampling = {"frames": frames, "fps": fps, "max_pixels": max_pixels}
    label = {key: value for key, value in settings.items() if key != "config" and value is not None}
    label |= {"config": config.to_dict()} if config is not None else {}
    wanted = {
        mode: {"model": loaded.name, "mode": mode, **sampling, "settings": label if mode == "psa" else {}}
        for mode in modes
    }
    done = {key: row for row in read_rows(output) for mode in modes if (key := _key(row, wanted[mode], mode))}
    rows = []
    with output.open("a", encoding="utf-8") as file:
        if file.tell() and not output.read_text(encoding="utf-8").endswith("\n"):
            file.write("\n")  # the last line was cut short
        for question in questions:
            vision: Vision | PSAError | None = None
            for mode in modes:
                row = done.get((question.id, mode))
                if row is None:
                    vision = _look(question, sampling) if vision is None else vision
                    row = {**wanted[mode], **_ask(loaded, question, vision, mode, settings)}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()
                rows.append(row)
                if on_row:
                    on_row(row)
    return rows


def _look(question: Question, sampling: dict[str, Any]) -> Vision | PSAError:
    try:
        return look([question.video], "video", **sampling)
    except PSAError as error:
        return error


def _ask(
    loaded: Loaded, question: Question, vision: Vision | PSAError, mode: str, settings: dict[str, Any]
) -> dict[str, Any]:
    facts = {"question_id": question.id, "duration": question.duration, "answer": question.answer}
    if isinstance(vision, PSAError):
        return {**facts, "error": str(vision), "choice": None, "correct": False}
    mine = settings if mode == "psa" else {}
    found: Answer = answer(loaded, question.prompt, vision, use_psa=mode == "psa", max_new_tokens=8, **mine)
    letter = choice(found.text)
    return {
        **facts,
        "text": found.text,
        "choice": letter,
        "correct": letter == question.answer,
        "prompt_tokens": found.prompt_tokens,
        "first_token_seconds": round(found.first_token_seconds, 4),
        "density": found.density,
    }


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a record; a last line cut short by an interruption is left out."""
    path = Path(path)
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _key(row: dict[str, Any], wanted: dict[str, Any], mode: str) -> tuple[str, str] | None:
    """What identifies a finished row of this evaluation; None for others and for failed ones."""
    if "error" in row or "question_id" not in row:
        return None
    same = all(row.get(name) == value for name, value in json.loads(json.dumps(wanted)).items())
    return (row["question_id"], mode) if same else None


@dataclass(frozen=True)
class Score:
    """Accuracy in one mode over one duration (or ``"all"``)."""

    mode: str
    duration: str
    questions: int
    accuracy: float
    density: float | None
    first_token_seconds: float | None


def scores(rows: Iterable[dict[str, Any]]) -> list[Score]:
    """Accuracy by mode and duration, and over all."""
    kept = list(rows)
    out = []
    for mode in dict.fromkeys(row["mode"] for row in kept):
        for duration in (*DURATIONS, "all"):
            chosen = [r for r in kept if r["mode"] == mode and duration in (r["duration"], "all")]
            if chosen:
                right = sum(bool(r["correct"]) for r in chosen) / len(chosen)
                out.append(Score(mode, duration, len(chosen), right, *(_mean(chosen, key) for key in MEANS)))
    return out


MEANS = ("density", "first_token_seconds")


def _mean(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else None


def summary(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """:func:`scores` as plain mappings."""
    return [asdict(score) for score in scores(rows)]
