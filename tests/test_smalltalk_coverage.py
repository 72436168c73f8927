"""Every method of the packages runs: in an SUnit test, or in an example against the live server."""

import pytest
from smalltalk_image import Image
from smalltalk_packages import CORE_TESTS, EXAMPLES, example_scripts, write_chunks, write_client
from smalltalk_sources.usage import CORE_PACKAGES


@pytest.fixture(scope="module")
def covered(live_server, tmp_path_factory):
    """The methods that ran neither in an SUnit test nor in an example, and what became of the examples."""
    folder = tmp_path_factory.mktemp("coverage")
    core = write_client(folder, live_server.base_url)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # an example saves a picture
        with Image(core, write_chunks(folder / "rest.st", CORE_TESTS, EXAMPLES), counting=True) as image:
            image.run_tests()
            for script in example_scripts(EXAMPLES):
                image.evaluate(f"{script}. nil")
            return image.methods_not_run()


def test_every_method_runs_in_a_test_or_an_example(covered):
    missing = "\n".join(covered)
    assert not covered, f"write an SUnit test in NeuroScope-Core-Tests for these methods, or remove them:\n{missing}"


def test_what_runs_here_are_all_packages_but_the_inspectors_and_the_baseline():
    assert {"NeuroScope-Core", CORE_TESTS, EXAMPLES} == set(CORE_PACKAGES)


def test_examples_are_the_methods_with_a_script_pragma():
    scripts = example_scripts(EXAMPLES)
    assert scripts
    assert all(each.startswith("NeuroScopeExamples ") for each in scripts)
