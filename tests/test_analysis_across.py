"""Several tasks: the first page begins with all headlines and one sentence over the tasks."""

import io
import re

from rich.console import Console

from analysis.cli import print_report
from analysis.profiles import geometric_mean
from analysis.report import build, text_files
from analysis_records import CPU, TASK, ldb, report_of, run_line, synthetic, with_run, write


def two_tasks(**changes):
    """The synthetic sweep on digits, where ldb wins, and on cifar10, where it takes as long as the baseline."""
    lines = synthetic(5)
    other = [line | {"run_key": line["run_key"] + "x"} for line in lines if "run_key" in line]
    other = [line | {"task": TASK | {"data": "cifar10"}} if "task" in line else line for line in other]
    for line in other:
        if line["kind"] == "run" and line["arm"] == "ldb":
            line["train_seconds"] += 3.0 + 0.05 * (-1) ** line["seed"]
    return lines, [line | changes if "device" in line else line for line in other]


def built(tmp_path, *parts, **options):
    return build([write(tmp_path / "records.jsonl", [line for part in parts for line in part])], **options)


def test_all_headlines_come_first_with_links_to_their_sections(tmp_path):
    made = built(tmp_path, *two_tasks())
    page = dict(text_files(made))["report.html"].decode()
    first = page[page.index("<h1>") : page.index('<article id="group1">')]
    for section in made.sections:
        assert f'<a href="#{section.group.slug}">{section.group.title}</a>: ' in first
        assert f'<article id="{section.group.slug}">' in page
    assert "Use ldb. Against bp: faster" in first
    assert "Stay with bp: no method is shown to be faster or more accurate." in first
    assert first.count("<li>") == 2


def test_one_sentence_counts_the_verdicts_over_the_tasks(tmp_path):
    made = built(tmp_path, *two_tasks())
    verdicts = {c.arm.name: [] for c in made.sections[0].answer.comparisons}
    for section in made.sections:
        for c in section.answer.comparisons:
            verdicts[c.arm.name].append(c)
    assert sorted(c.verdict for c in verdicts["ldb"]) == ["undecided", "wins"]
    mean = geometric_mean([c.speed for c in verdicts["ldb"]])
    said = f"Over 2 tasks: ldb wins in 1, undecided in 1 (mean speed-up {mean.value:.2f}× [{mean.low:.2f}×, "
    assert made.across_tasks.startswith(said), made.across_tasks
    assert "; dbp loses in 2 (mean speed-up 0.7" in made.across_tasks
    contents, screen = dict(text_files(made)), io.StringIO()
    print_report(made, Console(file=screen, width=400))
    plain = re.sub(r"\\|\xa0", lambda m: " " if m[0] == "\xa0" else "", contents["report.md"].decode())
    assert made.across_tasks in plain
    assert made.across_tasks in screen.getvalue()


def test_a_method_that_was_not_measured_everywhere_is_said(tmp_path):
    digits, cifar = two_tasks()
    made = built(tmp_path, digits, [line for line in cifar if line.get("arm") != "dbp"])
    assert "dbp loses in 1, not measured in 1." in made.across_tasks, made.across_tasks
    few = with_run(cifar, lambda r: r["arm"] == "ldb" and r["seed"] > 0, status="failed")
    made = built(tmp_path / "few", digits, few)
    assert "ldb wins in 1, too little data in 1" in made.across_tasks, made.across_tasks


def test_of_several_settings_the_best_counts_and_is_said(tmp_path):
    digits, cifar = two_tasks()
    slow = [run_line(arm="ldb", role="method", method=ldb(0.9), seed=s, train_seconds=20.0 + 0.1 * s) for s in range(5)]
    made = built(tmp_path, digits, slow, cifar)
    assert "ldb wins in 1, undecided in 1 (the best of its settings); dbp" in made.across_tasks, made.across_tasks


def test_the_same_task_on_two_machines_is_no_second_task(tmp_path):
    lines = synthetic(5)
    other = [line | {"run_key": line["run_key"] + "x"} for line in lines if "run_key" in line]
    other = [line | {"device": CPU | {"threads": 2}} if "device" in line else line for line in other]
    made = built(tmp_path, lines, other, allow_mixed=True)
    assert made.across_tasks.startswith("Over 2 pairs of task and hardware: ldb wins in 2")


def test_one_task_has_neither_list_nor_sentence(tmp_path):
    contents = report_of(tmp_path, synthetic(3))
    assert 'id="tasks"' not in contents["report.html"].decode()
    assert "Over " not in contents["report.md"].decode().partition("##")[0]
