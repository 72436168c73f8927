"""How many arguments the blocks take that Pharo's common messages are sent with, and what is wrong with those given."""

from __future__ import annotations

from smalltalk_sources.syntax import Block, Brace, Literal, Node, ParsedMethod, Send, Variable

_ANY = None
_NONE, _ONE, _TWO = (0,), (1,), (2,)
_AT_MOST_ONE = (0, 1)

BLOCKS: dict[str, tuple[tuple[int, ...] | None, ...]] = {
    **dict.fromkeys(("and:", "or:", "ensure:", "ifEmpty:", "ifFalse:", "ifNil:", "ifTrue:"), (_NONE,)),
    **dict.fromkeys(("timesRepeat:", "whileFalse:", "whileTrue:"), (_NONE,)),
    **dict.fromkeys(("ifTrue:ifFalse:", "ifFalse:ifTrue:"), (_NONE, _NONE)),
    **dict.fromkeys(("ifNotEmpty:", "ifNotNil:"), (_AT_MOST_ONE,)),
    **dict.fromkeys(("ifEmpty:ifNotEmpty:", "ifNil:ifNotNil:"), (_NONE, _AT_MOST_ONE)),
    **dict.fromkeys(("ifNotEmpty:ifEmpty:", "ifNotNil:ifNil:"), (_AT_MOST_ONE, _NONE)),
    **dict.fromkeys(("allSatisfy:", "anySatisfy:", "noneSatisfy:", "count:", "detect:"), (_ONE,)),
    **dict.fromkeys(("collect:", "select:", "reject:", "do:", "reverseDo:", "detectMax:", "detectMin:"), (_ONE,)),
    **dict.fromkeys(("associationsDo:", "keysDo:", "valuesDo:", "streamContents:"), (_ONE,)),
    **dict.fromkeys(("keysAndValuesDo:", "withIndexDo:", "withIndexCollect:", "doWithIndex:"), (_TWO,)),
    **dict.fromkeys(("sort:", "sorted:"), ((1, 2),)),
    **dict.fromkeys(("with:do:", "with:collect:", "inject:into:"), (_ANY, _TWO)),
    **dict.fromkeys(("at:ifAbsent:", "at:ifAbsentPut:", "indexOf:ifAbsent:"), (_ANY, _NONE)),
    **dict.fromkeys(("remove:ifAbsent:", "removeKey:ifAbsent:"), (_ANY, _NONE)),
    "at:ifPresent:": (_ANY, _ONE),
    "detect:ifNone:": (_ONE, _NONE),
    "do:separatedBy:": (_ONE, _NONE),
    "on:do:": (_ANY, _AT_MOST_ONE),
    "to:by:do:": (_ANY, _ANY, _ONE),
    "to:do:": (_ANY, _ONE),
}
"""For each argument of a message, how many arguments its block may take; None where it is no block."""


def block_problems(method: ParsedMethod) -> list[str]:
    """Blocks with too many or too few arguments, and literals where a block belongs; self has methods of its own."""
    return [
        f"line {send.line}: {send.selector} {problem}"
        for send in method.sends()
        if send.selector in BLOCKS and not _is_self(send)
        for argument, arities in zip(send.arguments, BLOCKS[send.selector], strict=True)
        if arities is not None and (problem := _problem(argument, arities))
    ]


def _is_self(send: Send) -> bool:
    return isinstance(send.receiver, Variable) and send.receiver.name in ("self", "super")


def _problem(argument: Node, arities: tuple[int, ...]) -> str | None:
    if isinstance(argument, Block) and len(argument.arguments) not in arities:
        wanted = " or ".join(map(str, arities))
        return f"takes a block of arity {wanted}, got one of arity {len(argument.arguments)}"
    if isinstance(argument, Brace) or (isinstance(argument, Literal) and argument.kind != "symbol"):
        return "takes a block, got a literal"
    return None
