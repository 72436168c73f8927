"""Traits on disk: what is found, in which order, and what is said when it is not there."""

import json
from pathlib import Path

import numpy as np
import pytest

from mlx_hooks import Experiment, HookError, TraitVector, UnknownVectorError, read_record
from mlx_hooks.analysis.traits.experiment import Trait
from mlx_hooks.analysis.traits.prompts import Chat
from mlx_hooks.cli import main


def make_trait(root: Path, name: str = "sum", experiment: str = "tests") -> Trait:
    (root / experiment / name / "extraction").mkdir(parents=True)
    return Experiment(root, experiment).trait(name)


def save(trait: Trait, *vectors: tuple[str, int], **metadata: object) -> None:
    """Vectors of methods at layers; all have this metadata."""
    for method, layer in vectors:
        TraitVector(trait.name, layer, method, np.arange(1, 5), metadata=metadata).save(trait.vectors_folder)


def write(path: Path, content: object) -> None:
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def test_traits_are_the_folders_with_an_extraction_folder(tmp_path: Path) -> None:
    for name in ("sum", "capital"):
        make_trait(tmp_path, name)
    (tmp_path / "tests" / "notes").mkdir()
    (tmp_path / "tests" / ".sum.writing" / "extraction").mkdir(parents=True)
    (tmp_path / "tests" / "inference_prompts.txt").write_text("One plus one is\n\nTwo plus two is\n")
    experiment = Experiment(str(tmp_path), "tests")
    assert [trait.name for trait in experiment.traits()] == ["capital", "sum"]
    assert experiment.folder == tmp_path / "tests"
    assert experiment.trait("sum").folder == tmp_path / "tests" / "sum"
    assert experiment.inference_prompts() == ["One plus one is", "Two plus two is"]
    with pytest.raises(HookError, match=r"^The experiment tests has no trait 'notes'. There are: capital, sum.$"):
        experiment.trait("notes")


@pytest.mark.parametrize("name", ["other", ".", "..", "", "tests/sum", "a.txt"])
def test_what_is_no_experiment_is_refused_with_what_there_is(name: str, tmp_path: Path) -> None:
    make_trait(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(HookError, match=rf"^There is no experiment '{name}' in {tmp_path}. There are: tests.$"):
        Experiment(tmp_path, name)
    with pytest.raises(HookError, match=r"There is no folder of experiments .*nowhere.$"):
        Experiment(tmp_path / "nowhere", "tests")
    (tmp_path / "empty").mkdir()
    with pytest.raises(HookError, match=r"has no trait 'sum'. There are: none.$"):
        Experiment(tmp_path, "empty").trait("sum")
    with pytest.raises(HookError, match=r"^There is no file .*empty/inference_prompts.txt.$"):
        Experiment(tmp_path, "empty").inference_prompts()


def test_settings_and_a_template_belong_to_the_trait(tmp_path: Path) -> None:
    plain, told = make_trait(tmp_path, "social_proof"), make_trait(tmp_path, "sum")
    assert plain.display_name == "Social Proof"
    assert plain.chat == Chat()
    assert plain.settings.method is None
    settings = {"display_name": "A sum", "chat": True, "system": "Be short.", "method": "ica", "layer": 2, "span": "1:"}
    write(told.folder / "trait.json", settings)
    (told.folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert told.display_name == "A sum"
    assert told.chat == Chat(True, "Be short.", "{{ messages[0].content }}")
    assert (told.settings.method, told.settings.layer, told.settings.span) == ("ica", 2, "1:")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "trait.json is no JSON"),
        ([1], "trait.json is a mapping with display_name, chat, system, method, layer, span, got"),
        ({"name": "x"}, r"a mapping with .*, got \{'name': 'x'\}"),
        ({"method": "lda"}, "trait.json: Unknown method 'lda'. There are: probe, mean_diff, ica, gradient, given."),
        ({"layer": -1}, "trait.json: A layer is a whole number from 0 up, got -1"),
        ({"layer": True}, "A layer is a whole number from 0 up, got True"),
        ({"chat": "yes"}, "chat is true, false or null, got 'yes'"),
        ({"system": " "}, "system is a text that is not empty"),
        ({"chat": False, "system": "Be short."}, "The trait sum: A chat that is not used has no system"),
    ],
)
def test_broken_settings_are_one_sentence(settings: object, message: str, tmp_path: Path) -> None:
    trait = make_trait(tmp_path)
    write(trait.folder / "trait.json", settings)
    with pytest.raises(HookError, match=message):
        _ = trait.chat


def test_settings_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    trait = make_trait(tmp_path)
    (trait.folder / "trait.json").mkdir()
    with pytest.raises(HookError, match=r"trait.json cannot be read: Is a directory.$"):
        _ = trait.settings
    other = make_trait(tmp_path, "other")
    (other.folder / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(HookError, match="chat_template.jinja cannot be read"):
        _ = other.chat


def test_prompts_are_read_from_text_or_json(tmp_path: Path) -> None:
    trait = make_trait(tmp_path)
    folder = trait.folder / "extraction"
    (folder / "positive.txt").write_text("a\nb\n")
    write(folder / "negative.json", ["c\nd"])
    assert trait.prompts("positive") == ["a", "b"]
    assert trait.prompts("negative") == ["c\nd"]
    assert trait.held_out() is None
    (folder / "held_out_positive.txt").write_text("e\n")
    with pytest.raises(HookError, match=r"has no held_out_negative prompts: write .*held_out_negative.txt or held_out"):
        trait.held_out()
    write(folder / "held_out_negative.json", ["f"])
    assert trait.held_out() == (["e"], ["f"])
    (folder / "positive.json").write_text("[]")
    with pytest.raises(HookError, match="has both .*positive.txt and positive.json: remove one"):
        trait.prompts("positive")


def test_the_method_is_the_first_of_the_stated_order(tmp_path: Path) -> None:
    """And layers are numbers: layer 10 comes after layer 2."""
    trait = make_trait(tmp_path)
    save(trait, ("gradient", 1), ("given", 0), ("ica", 10), ("ica", 2), ("mean_diff", 3), ("probe", 4))
    (trait.vectors_folder / "probe_layer04.safetensors").touch()
    (trait.vectors_folder / "notes.txt").touch()
    order = ["probe_layer4", "mean_diff_layer3", "ica_layer2", "ica_layer10", "gradient_layer1", "given_layer0"]
    assert [file.name for file in trait.vectors()] == order
    for name in order:
        if name == "ica_layer10":
            continue
        assert trait.find().name == name
        for file in trait.vectors():
            if file.method == name.split("_layer")[0]:
                file.path.unlink()
    with pytest.raises(HookError, match=r"^The trait sum has no vectors in .*vectors: extract them first.$"):
        trait.find()


def test_what_is_asked_for_goes_before_settings_and_these_before_the_order(tmp_path: Path) -> None:
    trait = make_trait(tmp_path)
    save(trait, *[(method, layer) for method in ("probe", "ica", "gradient") for layer in (1, 2)], ("mean_diff", 5))
    assert trait.find().name == "probe_layer1"
    assert trait.find(layer=2).name == "probe_layer2"
    assert trait.find(layer=5).name == "mean_diff_layer5"
    assert trait.find("gradient", 2).name == "gradient_layer2"
    write(trait.folder / "trait.json", {"method": "ica", "layer": 2})
    trait = Trait(trait.folder)
    assert trait.find().name == "ica_layer2"
    assert trait.find(method="probe").name == "probe_layer2"
    assert trait.find(layer=1).name == "ica_layer1"
    assert trait.choose().why == "ica: by trait.json; layer 2: by trait.json"
    assert trait.choose("probe", 1).why == "probe: as asked; layer 1: as asked"
    there_are = "There are: probe_layer1, probe_layer2, mean_diff_layer5, ica_layer1"
    asked = r"no vector of method ica \(by trait.json\) and layer 5 \(as asked\)"
    with pytest.raises(HookError, match=rf"{asked}\. {there_are}"):
        trait.find(layer=5)
    with pytest.raises(HookError, match=r"no vector of layer 9 \(as asked\). There are"):
        Trait(make_copy(trait, tmp_path)).find(layer=9)


def make_copy(trait: Trait, root: Path) -> Path:
    """The same vectors under another name, without settings."""
    copy = make_trait(root, "copy")
    save(copy, *[(file.method, file.layer) for file in trait.vectors()])
    return copy.folder


def test_the_layer_is_that_of_the_best_held_out_accuracy(tmp_path: Path) -> None:
    trait = make_trait(tmp_path)
    measured = {0: (0.5, 9.0), 1: (0.9, 1.0), 2: (0.9, 2.0), 3: (0.9, 2.0), 10: (0.8, 9.0)}
    for layer, (accuracy, effect_size) in measured.items():
        save(trait, ("probe", layer), held_out_accuracy=accuracy, effect_size=effect_size)
    assert trait.find().layer == 2
    assert trait.choose().why == (
        "probe: the first of probe, mean_diff, ica, gradient that there is; layer 2: the best accuracy on held-out "
        "prompts, 90.0%, of equals the one with the larger effect size"
    )
    # Classes that do not scatter at all are as far apart as can be.
    save(trait, ("probe", 3), held_out_accuracy=0.9, effect_size=None)
    assert trait.find().layer == 3
    save(trait, ("probe", 0), held_out_accuracy=1.0, effect_size=0.1)
    assert trait.find().layer == 0
    assert trait.choose().why.endswith("layer 0: the best accuracy on held-out prompts, 100.0%")


def test_without_held_out_prompts_the_effect_size_decides(tmp_path: Path) -> None:
    trait = make_trait(tmp_path)
    for layer, effect_size in enumerate([1.0, 3.0, 2.0]):
        save(trait, ("ica", layer), held_out_accuracy=None, effect_size=effect_size)
    assert trait.find().layer == 1
    assert trait.choose().why.endswith("the largest effect size, since no prompts were held out")
    save(trait, ("mean_diff", 7))
    assert trait.choose().why.endswith("layer 7: the only one")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"method": "lda"}, "Unknown method 'lda'. There are: probe, mean_diff, ica, gradient, given."),
        ({"layer": -1}, "A layer is a whole number from 0 up, got -1"),
        ({"layer": "1"}, "A layer is a whole number from 0 up, got '1'"),
    ],
)
def test_what_is_no_method_or_layer_is_refused(asked: dict, message: str, tmp_path: Path) -> None:
    trait = make_trait(tmp_path)
    save(trait, ("probe", 1))
    with pytest.raises(HookError, match=message):
        trait.find(**asked)


def test_a_vector_is_what_its_file_is_called_and_its_folders_trait(tmp_path: Path) -> None:
    trait = make_trait(tmp_path)
    save(trait, ("probe", 1))
    file = trait.vectors()[0].path
    renamed = trait.folder.rename(tmp_path / "tests" / "addition")
    found = Trait(renamed).find()
    assert (found.trait, found.path) == ("addition", renamed / "extraction" / "vectors" / file.name)
    found.path.rename(found.path.with_name("ica_layer1.safetensors"))
    with pytest.raises(HookError, match="ica_layer1.safetensors holds the vector probe_layer1: a file is called as"):
        Trait(renamed).find()


def test_a_damaged_vector_is_named(tmp_path: Path) -> None:
    trait = make_trait(tmp_path)
    save(trait, ("probe", 1), ("probe", 2))
    path = trait.vectors()[1].path
    path.write_bytes(path.read_bytes()[:-3])
    broken = "probe_layer2.safetensors is no trait vector that can be read"
    with pytest.raises(HookError, match=broken):
        trait.find(layer=2)
    assert trait.find(layer=1).layer == 1
    # Where the layer is not said, another one's will do.
    choice = trait.choose()
    assert choice.vector.layer == 1
    assert choice.why.endswith("layer 1: the only one (passed over, since it cannot be read: probe_layer2)")
    save(trait, ("ica", 3))
    trait.vectors()[0].path.write_bytes(b"")
    with pytest.raises(HookError, match="probe_layer1.safetensors is no trait vector"):
        trait.find()
    assert trait.find("ica").layer == 3


def test_a_vector_that_does_not_say_how_has_its_traits_way_to_put_prompts(tmp_path: Path) -> None:
    trait = make_trait(tmp_path, "mine")
    write(trait.folder / "trait.json", {"chat": False})
    save(trait, ("given", 0))
    said = Chat(system="Be brief")
    TraitVector("mine", 1, "given", np.arange(1, 5), chat=said).save(trait.vectors_folder)
    assert trait.find(layer=0).chat == Chat(False)
    assert trait.find(layer=1).chat == said
    assert trait.choose(layer=0).why == "given: there is no other; layer 0: as asked"


def test_that_there_is_no_vector_is_told_from_one_that_cannot_be_read(tmp_path: Path) -> None:
    trait = make_trait(tmp_path)
    with pytest.raises(UnknownVectorError, match="has no vectors in"):
        trait.find()
    save(trait, ("probe", 0))
    with pytest.raises(UnknownVectorError, match=r"no vector of layer 3 \(as asked\)"):
        trait.find(layer=3)
    (trait.vectors_folder / "probe_layer0.safetensors").write_text("rubbish")
    with pytest.raises(HookError) as failure:
        trait.find()
    assert not isinstance(failure.value, UnknownVectorError)


def test_all_commands_put_a_prompt_in_the_traits_way(tmp_path: Path) -> None:
    trait = make_trait(tmp_path, "mine")
    write(trait.folder / "trait.json", {"chat": False})
    vector = TraitVector("mine", 1, "given", np.arange(1, 129), metadata={"model": "neuroscope-tiny"})
    vector.save(trait.vectors_folder)
    where = ["--experiment", "tests", "--root", str(tmp_path), "--max-tokens", "1"]
    asked = [*where, "--prompts", "Hello"]
    assert main(["traits", "dynamics", *asked, "--output", str(tmp_path / "d.json")]) == 0
    steered = [*where, "--trait", "mine", "--prompt", "Hello", "--coefficients=1", "--json", str(tmp_path / "s.json")]
    assert main(["traits", "steer", *steered]) == 0
    assert main(["traits", "capture-layers", *asked, "--trait", "mine"]) == 0
    record = read_record(trait.folder / "inference" / "residual_stream_activations" / "prompt_0.safetensors")
    moved = json.loads((tmp_path / "d.json").read_text())["results"][0]
    pushed = json.loads((tmp_path / "s.json").read_text())
    for read in (record, moved, pushed):
        assert read["prompt"]["tokens"] == ["<bos>", "Hello"]
