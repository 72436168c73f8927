"""What would run elsewhere, read here: the workflow, and what it loads into Pharo."""

import json
import re
from pathlib import Path

import pytest
import yaml
from smalltalk_check import PHARO
from smalltalk_sources.syntax import Literal, parse_method
from smalltalk_sources.tonel import PACKAGES, SMALLTALK, parse_file

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture(params=WORKFLOWS, ids=lambda file: file.name)
def workflow(request):
    return yaml.safe_load(request.param.read_text())


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_workflows_may_read_and_no_more(workflow):
    assert workflow["permissions"] == {"contents": "read"}
    assert not [job for job in workflow["jobs"].values() if "permissions" in job]


def test_actions_are_pinned_to_commits(workflow):
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert used
    assert [each for each in used if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", each)] == []
    branches = {step["with"]["smalltalkCI-branch"] for step in steps(workflow) if "smalltalk" in step.get("uses", "")}
    assert [each for each in branches if not re.fullmatch(r"[0-9a-f]{40}", each)] == []


def test_every_job_ends(workflow):
    assert all(job["timeout-minutes"] <= 60 for job in workflow["jobs"].values())


def test_pharo_runs_in_the_versions_that_the_package_was_checked_against():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    versions = json.loads(PHARO.read_text())["pharo"]
    assert jobs["pharo"]["strategy"]["matrix"]["smalltalk"] == [f"Pharo64-{version}" for version in versions]
    assert {"ubuntu-24.04", "macos-15"} == set(jobs["python"]["strategy"]["matrix"]["os"])


def test_python_runs_what_the_makefile_has(workflow):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = re.findall(r"\bmake (?:\w+=\S+ )*(\S+)", " ".join(step.get("run", "") for step in steps(workflow)))
    assert commands
    assert set(commands) <= set(targets)


# -- what is loaded ------------------------------------------------------------------------------


def baseline_strings(selector):
    """For each message of that name in the baseline, the strings in it, one list per argument."""
    baseline = parse_file(SMALLTALK / "BaselineOfNeuroScope" / "BaselineOfNeuroScope.class.st")
    sends = [send for method in baseline.methods for send in parse_method(method.source).sends()]
    return [
        [
            re.findall(r"'([^']*)'", node.text)
            for argument in send.arguments
            for node in argument.walk()
            if isinstance(node, Literal)
        ]
        for send in sends
        if send.selector == selector
    ]


def test_the_baseline_has_every_package_and_its_groups_hold_what_there_is():
    packages = [names[0][0] for names in baseline_strings("package:") + baseline_strings("package:with:")]
    assert sorted(packages) == sorted(set(PACKAGES) - {"BaselineOfNeuroScope"})
    required = {name for names in baseline_strings("package:with:") for name in names[1]}
    assert required <= set(packages)
    groups = {names[0][0]: names[1] for names in baseline_strings("group:with:")}
    assert set(groups) == {"core", "inspector", "examples", "tests", "default"}
    assert {name for members in groups.values() for name in members} <= {*packages, *groups}
    assert {name for members in groups.values() for name in members if name in packages} == set(packages)


def test_smalltalk_ci_loads_groups_that_exist_and_runs_the_tests():
    spec = (ROOT / ".smalltalk.ston").read_text()
    groups = {names[0][0] for names in baseline_strings("group:with:")}
    (loaded,) = re.findall(r"#load : \[(.*?)\]", spec)
    assert set(re.findall(r"'(\w+)'", loaded)) <= groups
    assert re.findall(r"#(?:baseline|directory) : '([^']*)'", spec) == ["NeuroScope", SMALLTALK.name]
    (tested,) = re.findall(r"#packages : \[(.*?)\]", spec)
    assert set(re.findall(r"'([^']*)'", tested)) <= set(PACKAGES)
