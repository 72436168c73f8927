"""The SUnit tests of the package, run by Amber: one test here for each of them, without a server outside the image."""

import pytest
from smalltalk_image import Image
from smalltalk_packages import CORE, CORE_TESTS, sunit_tests, write_chunks


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    with Image(write_chunks(tmp_path_factory.mktemp("sunit") / "packages.st", CORE, CORE_TESTS)) as image:
        return image.run_tests()


@pytest.mark.parametrize("test", sunit_tests(CORE_TESTS))
def test_sunit(outcomes, test):
    found = outcomes[test]
    assert found["outcome"] == "passed", found["message"]


def test_the_image_runs_the_tests_that_the_package_has(outcomes):
    assert sorted(outcomes) == sorted(sunit_tests(CORE_TESTS))


# -- the runner itself ---------------------------------------------------------------------------

ODD_TEST = """\
TestCase subclass: #OddTest
\tinstanceVariableNames: 'log'
\tclassVariableNames: ''
\tpoolDictionaries: ''
\tcategory: 'Odd'!

!OddTest methodsFor: 'tests'!
testPasses
\tself assert: 3 equals: 3! !

!OddTest methodsFor: 'tests'!
testFails
\tself assert: 3 equals: 4! !

!OddTest methodsFor: 'tests'!
testErrs
\t3 frobnicate! !

!OddTest methodsFor: 'tests'!
testSkips
\tself skip: 'not today'! !

!OddTest methodsFor: 'tests'!
helper: anObject
\t^ super yourself! !

!OddTest class methodsFor: 'tests'!
unused
\t^ self! !

!Number methodsFor: '*Odd'!
frobbed
\t^ self! !
"""


@pytest.fixture
def odd_image(tmp_path):
    file = tmp_path / "odd.st"
    file.write_text(ODD_TEST)
    with Image(file, counting=True) as image:
        yield image


def test_the_runner_tells_outcomes_apart(odd_image):
    assert odd_image.run_tests() == {
        "OddTest>>testPasses": {"outcome": "passed", "message": ""},
        "OddTest>>testFails": {"outcome": "failed", "message": "Got 3 instead of 4."},
        "OddTest>>testErrs": {
            "outcome": "error",
            "message": "MessageNotUnderstood: 3 does not understand #frobnicate",
        },
        "OddTest>>testSkips": {"outcome": "skipped", "message": "not today"},
    }


def test_methods_that_never_ran_are_known(odd_image):
    odd_image.run_tests()
    assert odd_image.methods_not_run() == ["Number>>frobbed", "OddTest class>>unused", "OddTest>>helper:"]
    odd_image.evaluate("3 frobbed. OddTest new helper: 3")
    assert odd_image.methods_not_run() == ["OddTest class>>unused"]


@pytest.mark.parametrize(("variables", "body", "answer"), [("", "3", 3), ("", "4", 4), ("x", "x", None), ("x", "3", 3)])
def test_what_is_kept_of_the_compiler_belongs_to_source_and_class(tmp_path, variables, body, answer):
    file = tmp_path / "kept.st"
    definition = f"Object subclass: #Kept instanceVariableNames: '{variables}' package: 'Odd'!"
    file.write_text(f"{definition}\n\n!Kept methodsFor: 'odd'!\nodd\n\t^ {body}! !\n")
    for _ in range(2):
        with Image(file) as image:
            assert image.evaluate("Kept new odd") == answer
