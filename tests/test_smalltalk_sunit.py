"""The SUnit tests of the package, run by Amber: one test here for each of them, without a server outside the image."""

import pytest
from smalltalk_image import run_sunit
from smalltalk_packages import CORE, CORE_TESTS, sunit_tests, write_chunks


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_sunit(write_chunks(tmp_path_factory.mktemp("sunit") / "packages.st", CORE, CORE_TESTS))


@pytest.mark.parametrize("test", sunit_tests(CORE_TESTS))
def test_sunit(outcomes, test):
    found = outcomes[test]
    if found["outcome"] == "skipped":
        pytest.skip(found["message"])
    assert found["outcome"] == "passed", found["message"]


def test_the_image_runs_the_tests_that_the_package_has(outcomes):
    assert sorted(outcomes) == sorted(sunit_tests(CORE_TESTS))
