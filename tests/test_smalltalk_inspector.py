"""The panes of the inspector under Amber: when they are there, and what their tables hold. Spec and Roassal are not."""

from pathlib import Path

import pytest
from smalltalk_image import Image
from smalltalk_packages import CORE, CORE_TESTS, INSPECTOR, write_chunks

# Spec's tables as far as the panes fill them, and the context that a pane is switched off in.
SPEC = """
Object subclass: #SpStringTableColumn
	instanceVariableNames: 'title block'
	package: 'Spec'!
!SpStringTableColumn class methodsFor: 'instance creation'!
title: aString evaluated: aBlock
	^ self new setTitle: aString block: aBlock; yourself
! !
!SpStringTableColumn methodsFor: 'accessing'!
setTitle: aString block: aBlock
	title := aString.
	block := aBlock
!
textFor: anItem
	^ block value: anItem
! !
Object subclass: #TableStub
	instanceVariableNames: 'columns items active'
	package: 'Spec'!
!TableStub methodsFor: 'accessing'!
newTable
	columns := OrderedCollection new
!
addColumn: aColumn
	columns add: aColumn
!
items: anArray
	items := anArray
!
cells
	^ items collect: [ :item | columns collect: [ :column | column textFor: item ] ]
!
active: aBoolean
	active := aBoolean
!
active
	^ active
! !
Object subclass: #CacheStub
	instanceVariableNames: 'statistics'
	package: 'Spec'!
!CacheStub methodsFor: 'accessing'!
statistics: rows
	statistics := rows
!
statistics
	^ statistics
! !
"""
SCORES = "(ActivationTensor data: { 1.0. Float negativeInfinity. 0.5. 0.25. Float nan. 2.0 } shape: #( 3 2 ))"


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspector")
    spec: Path = folder / "spec.st"
    spec.write_text(SPEC, encoding="ascii")
    with Image(spec, write_chunks(folder / "panes.st", CORE, CORE_TESTS, INSPECTOR)) as image:
        yield image.evaluate


def test_rows_of_scores_are_shown_where_they_hold_minus_infinity(evaluate):
    first, second, third = evaluate(f"(t := TableStub new). {SCORES} inspectionRows: t. t cells")
    infinity, nan = evaluate("{ Float negativeInfinity printString. Float nan printString }")
    assert (first[0], first[2], first[4], first[5]) == ("1", infinity, infinity, "1.0000")
    assert second == ["2", "0.5590", "0.3750", "0.1250", "0.2500", "0.5000"]
    assert third[:3] == ["3", nan, nan]


def test_activations_of_a_run_are_shown_where_they_hold_minus_infinity(evaluate):
    row = {"norm": "Float infinity", "mean": "Float negativeInfinity", "std": "Float nan", "min": "3", "max": "1 / 8"}
    fields = "; ".join(f"at: '{name}' put: {number}" for name, number in row.items())
    cells = evaluate(
        f"row := Dictionary new at: 'layer' put: 2; at: 'component' put: 'attention_scores'; {fields}; yourself."
        "reply := Dictionary new at: 'tokens' put: nil; at: 'hooks' put: nil; yourself."
        "cache := CacheStub new statistics: { row }; yourself."
        "run := CachedRun reply: reply output: nil cache: cache."
        "t := TableStub new. run inspectionActivations: t. t cells"
    )
    texts = evaluate("{ Float infinity. Float negativeInfinity. Float nan } collect: [ :each | each printString ]")
    assert cells == [["2", "attention_scores", *texts, "3.0000", "0.1250"]]


def test_inspecting_a_lazy_tensor_asks_the_server_for_nothing(evaluate):
    found = evaluate(
        "test := LazyActivationTensorTest selector: #testItsNumbersAreFetchedOnce. test setUp. tensor := test tensor."
        "shown := [ #( #inspectionHeatmapContext: #inspectionRowsContext: ) collect: [ :each |"
        " c := TableStub new. tensor perform: each with: c. c active ] ]."
        "before := shown value. fetched := tensor isFetched. tensor data. r := { before. fetched. shown value }."
        "test tearDown. r"
    )
    assert found == [[False, False], False, [True, True]]
