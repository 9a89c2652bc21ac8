"""The grader: what is right, what is wrong with the smallest failing case, and points.

    python teaching/grade.py                         all exercises
    python teaching/grade.py 06 07                   some
    python teaching/grade.py --folder ~/anna         answers that lie elsewhere
    python teaching/grade.py --reference             the right answers, which the five files give

An exercise has parts. Each part has cases, the smallest first, and looks at what an answer does in
each. The first case in which it does something else than the reference is drawn. If it does, in
all cases, what one of the wrong answers in wrong.py does, then we know the mistake and name it.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if str(HERE.parent) not in sys.path:
    sys.path.insert(0, str(HERE.parent))  # where the five files are

from teaching import checks_data, checks_model, reference, wrong  # noqa: E402
from teaching.parts import Exercise, Part, Raised, equal  # noqa: E402

EXERCISES = {exercise.number: exercise for exercise in sorted(
    [*checks_data.EXERCISES, *checks_model.EXERCISES], key=lambda exercise: exercise.number)}

Answer = dict[str, Callable[..., Any]]  # an exercise's functions by their names
NOT_WRITTEN = "not written yet"


@dataclass(frozen=True)
class Result:
    """What became of one part."""

    part: Part
    points: int
    message: str = ""  # what is wrong, drawn; empty if nothing is


@cache  # of the reference and of wrong answers all parts ask, and ranks take seconds to start
def look(part: Part, function: Callable[..., Any]) -> list[Any]:
    """What a function does in each of a part's cases."""
    return part.look(function, part.cases())


@cache
def look_right(part: Part, number: str) -> list[Any]:
    """What is right in each case: what the reference does, or what one process does for ranks."""
    function = reference.ANSWERS[number][part.function]
    return part.right(function, part.cases()) if part.right else look(part, function)


def first_failing(part: Part, number: str, yours: list[Any]) -> tuple[Any, Any, Any] | None:
    """The first (case, yours, right) that does not pass."""
    triples = zip(part.cases(), yours, look_right(part, number), strict=True)
    return next((triple for triple in triples if not part.accept(*triple)), None)


def grade_part(part: Part, number: str, function: Callable[..., Any]) -> Result:
    """Hold one function against what is right, case by case."""
    yours = look(part, function)
    if any(isinstance(found, NotImplementedError) for found in yours):
        return Result(part, 0, NOT_WRITTEN)
    failing = first_failing(part, number, yours)
    if failing is None:
        return Result(part, part.points)
    case, found, expected = failing
    lines = [*diagnose(part, number, function), "the smallest case that fails:"]
    lines += ["  " + line for line in part.draw(case).splitlines()]
    if isinstance(found, Raised | Exception):
        lines.append(f"  yours  {found}{getattr(found, 'where', '')}")
    else:
        lines += ["  " + line for line in part.compare(case, found, expected).splitlines()]
    return Result(part, 0, "\n".join(lines))


def diagnose(part: Part, number: str, function: Callable[..., Any]) -> list[str]:
    """The words of a wrong answer that does the same as this one, if there is one.

    Best is one that does the same in all parts; two mistakes at once are known part by part. If
    there is none, we name what does the same in the first failing case and in most others.
    """
    alike = [mistake for mistake in wrong.WRONG
             if (mistake.exercise, mistake.function) == (number, part.function)
             and same(part, function, mistake.answer)
             and first_failing(part, number, look(part, mistake.answer))]
    parts = [other for other in EXERCISES[number].parts if other.function == part.function]
    everywhere = [mistake for mistake in alike
                  if all(same(other, function, mistake.answer) for other in parts)]
    if alike:
        return ["it looks as if " + ", or ".join(mistake.says for mistake in everywhere or alike)]
    yours, right = look(part, function), look_right(part, number)
    failing = [i for i, triple in enumerate(zip(part.cases(), yours, right, strict=True))
               if not part.accept(*triple)]
    nearly = {}
    for mistake in wrong.WRONG:
        if (mistake.exercise, mistake.function) == (number, part.function):
            theirs = look(part, mistake.answer)
            as_yours = [equal(yours[i], theirs[i]) for i in failing]
            if as_yours[0] and sum(as_yours) > len(failing) / 2:
                nearly[mistake.says] = sum(as_yours)
    best = max(nearly, key=lambda says: nearly[says], default="")
    return [f"in {nearly[best]} of {len(failing)} cases it looks as if {best}"] if best else []


def same(part: Part, one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether two answers do the same in all cases of a part."""
    return all(equal(a, b) for a, b in zip(look(part, one), look(part, other), strict=True))


def grade(exercise: Exercise, answer: Answer) -> list[Result]:
    """Grade all parts. A function that is missing counts as not written."""
    results = []
    for part in exercise.parts:
        if part.function in answer:
            results.append(grade_part(part, exercise.number, answer[part.function]))
        else:
            results.append(Result(part, 0, f"there is no function {part.function}"))
    return results


def load(exercise: Exercise, folder: Path) -> Answer:
    """The functions of a student's file. They are imported by name, so that ranks find them."""
    name = next(iter(sorted(folder.glob(f"{exercise.number}_*.py")))).stem
    sys.path.insert(0, str(folder))
    sys.modules.pop(name, None)
    importlib.invalidate_caches()
    module = importlib.import_module(name)
    names = {part.function for part in exercise.parts}
    return {key: getattr(module, key) for key in names if hasattr(module, key)}


def load_or_say_why_not(exercise: Exercise, folder: Path) -> tuple[Answer | None, str]:
    try:
        return load(exercise, folder), ""
    except StopIteration:
        return None, f"there is no file {exercise.number}_*.py in {folder}"
    except (Exception, SystemExit) as error:  # a student's file may hold anything
        return None, f"the file cannot be imported: {type(error).__name__}: {error}"


def report(exercise: Exercise, results: list[Result]) -> str:
    """An exercise's points, and a line for each part; below it what is wrong."""
    points, most = sum(r.points for r in results), sum(part.points for part in exercise.parts)
    lines = [f"{exercise.number} {exercise.title}: {points} of {most} points"]
    if all(result.message == NOT_WRITTEN for result in results):
        return f"{lines[0]}, {NOT_WRITTEN}"
    for result in results:
        state = {"": "right", NOT_WRITTEN: NOT_WRITTEN}.get(result.message, "wrong")
        lines.append(f"  {state}  [{result.points}/{result.part.points}] {result.part.asks}")
        if state == "wrong":
            lines += ["         " + line for line in result.message.splitlines()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("numbers", nargs="*", help="such as 06; without any: all")
    parser.add_argument("--reference", action="store_true", help="grade the five files themselves")
    parser.add_argument("--folder", type=Path, default=HERE / "exercises", help="of the answers")
    options = parser.parse_args()
    numbers = [number.zfill(2) for number in options.numbers] or list(EXERCISES)
    unknown = [number for number in numbers if number not in EXERCISES]
    if unknown:
        parser.error(f"there is no exercise {unknown[0]}; choose from {', '.join(EXERCISES)}")
    points = most = 0
    for exercise in (EXERCISES[number] for number in numbers):
        of_all = sum(part.points for part in exercise.parts)
        answer, problem = reference.ANSWERS[exercise.number], ""
        if not options.reference:
            answer, problem = load_or_say_why_not(exercise, options.folder.resolve())
        if answer is None:
            print(f"{exercise.number} {exercise.title}: 0 of {of_all} points, {problem}")
        else:
            results = grade(exercise, answer)
            points += sum(result.points for result in results)
            print(report(exercise, results), flush=True)
        most += of_all
    print(f"{points} of {most} points")
    sys.exit(0 if points == most else 1)


if __name__ == "__main__":
    main()
