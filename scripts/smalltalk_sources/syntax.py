"""The grammar of a Smalltalk method: tokens, a parser, and a tree of what it says.

    method = parse_method("double: x\\n\\n\\t^ x + x")
    method.selector                                    # 'double:'
    [each.selector for each in method.sends()]         # ['+']

The grammar is Pharo's (without its compile-time extensions), as told in Pharo's own parser and in the ANSI draft.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


class SmalltalkSyntaxError(ValueError):
    """What is wrong in a method, and in which of its lines, counted from 1."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(f"line {line}: {message}")
        self.line = line


@dataclass(frozen=True)
class Token:
    """A piece of source; `kind` is a name of `TOKENS` or, for brackets and the like, the text itself."""

    kind: str
    text: str
    start: int
    line: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)


@dataclass
class Node:
    """A part of a method."""

    line: int

    def children(self) -> list["Node"]:
        return []

    def walk(self) -> Iterator["Node"]:
        """This node, then all below it, in the order of the source."""
        yield self
        for child in self.children():
            yield from child.walk()


@dataclass
class Literal(Node):
    """`kind` is number, string, symbol, character, array or bytes; `text` is the source."""

    kind: str
    text: str


@dataclass
class Variable(Node):
    name: str


@dataclass
class Assignment(Node):
    name: str
    value: Node

    def children(self) -> list[Node]:
        return [self.value]


@dataclass
class Return(Node):
    value: Node

    def children(self) -> list[Node]:
        return [self.value]


@dataclass
class Send(Node):
    """A message; the parts of a cascade are sends to one receiver, which walk() visits with the first of them."""

    receiver: Node
    selector: str
    arguments: list[Node]
    in_cascade: bool = False

    def children(self) -> list[Node]:
        return self.arguments if self.in_cascade else [self.receiver, *self.arguments]


@dataclass
class Cascade(Node):
    sends: list[Send]

    def children(self) -> list[Node]:
        return list(self.sends)


@dataclass
class Brace(Node):
    elements: list[Node]

    def children(self) -> list[Node]:
        return self.elements


@dataclass
class Block(Node):
    arguments: list[str]
    temporaries: list[str]
    statements: list[Node]

    def children(self) -> list[Node]:
        return self.statements


@dataclass(frozen=True)
class Pragma:
    """`<script>` or `<inspectorPresentationOrder: 0 title: 'Heatmap'>`, with where it stands in the source."""

    selector: str
    arguments: list[str]
    start: int
    end: int


@dataclass
class ParsedMethod(Block):
    selector: str = ""
    pragmas: list[Pragma] = field(default_factory=list)

    def sends(self) -> list[Send]:
        return [each for each in self.walk() if isinstance(each, Send)]


TOKENS = {
    "space": r"\s+",
    "comment": r'"(?:[^"]|"")*"',
    "string": r"'(?:[^']|'')*'",
    "character": r"\$[\s\S]",
    "scaled": r"-?\d+(?:\.\d+)?s\d*(?![A-Za-z0-9])",
    "number": r"-?\d+(?:r-?[0-9A-Z]+|(?:\.\d+)?(?:e-?\d+)?)(?![A-Za-z0-9_])",
    "assign": r":=",
    "symbol": r"#(?:'(?:[^']|'')*'|(?:[A-Za-z_]\w*:)+|[A-Za-z_]\w*|[-+*/\\~<>=@%|&?,!]+)",
    "keywords": r"(?:[A-Za-z_]\w*:(?!=)){2,}",
    "keyword": r"[A-Za-z_]\w*:(?!=)",
    "name": r"[A-Za-z_]\w*",
    "open": r"#\(|#\[",
    "binary": r"[-+*/\\~<>=@%|&?,!]+",
    "mark": r"[()\[\]{}^.;:#]",
}
_TOKEN = re.compile("|".join(f"(?P<{kind}>{pattern})" for kind, pattern in TOKENS.items()))
_NAMED_LITERALS = ("string", "character", "number", "symbol")


def tokenize(source: str) -> list[Token]:
    """All tokens but space and comments.

    Raises:
        SmalltalkSyntaxError: a character that begins nothing, such as the quote of a string without end.
    """
    tokens, start, line = [], 0, 1
    while start < len(source):
        match = _TOKEN.match(source, start)
        if not match:
            raise SmalltalkSyntaxError(f"nothing begins with {source[start : start + 10]!r}", line)
        kind, text = str(match.lastgroup), match[0]
        if kind in ("mark", "open"):
            kind = text
        if kind not in ("space", "comment"):
            tokens.append(Token(kind, text, start, line))
        line += text.count("\n")
        start += len(text)
    return [*tokens, Token("end", "", len(source), line)]


def parse_method(source: str) -> ParsedMethod:
    """The tree of a method, whose source begins with the selector.

    Raises:
        SmalltalkSyntaxError: it is not a method of Smalltalk.
    """
    return _Parser(source).method()


class _Parser:
    def __init__(self, source: str) -> None:
        self.tokens = tokenize(source)
        self.index = 0

    # -- tokens --

    @property
    def token(self) -> Token:
        return self.tokens[self.index]

    def at(self, kind: str, text: str | None = None) -> bool:
        return self.token.kind == kind and text in (None, self.token.text)

    def next(self) -> Token:
        token = self.token
        self.index += 1
        return token

    def take(self, kind: str, what: str) -> Token:
        if not self.at(kind):
            raise SmalltalkSyntaxError(f"expected {what}, got {self.token.text or 'the end'!r}", self.token.line)
        return self.next()

    # -- methods --

    def method(self) -> ParsedMethod:
        line = self.token.line
        selector, arguments = self.pattern()
        pragmas = self.pragmas()
        temporaries = self.temporaries()
        pragmas += self.pragmas()
        statements = self.statements("end")
        self.take("end", "the end of the method")
        return ParsedMethod(line, arguments, temporaries, statements, selector, pragmas)

    def pattern(self) -> tuple[str, list[str]]:
        if self.at("name"):
            return self.next().text, []
        if self.at("binary"):
            return self.next().text, [self.take("name", "an argument").text]
        parts, arguments = [], []
        while self.at("keyword"):
            parts.append(self.next().text)
            arguments.append(self.take("name", "an argument").text)
        if not parts:
            self.take("keyword", "a message pattern")
        return "".join(parts), arguments

    def pragmas(self) -> list[Pragma]:
        found = []
        while self.at("binary", "<"):
            start = self.next().start
            parts, arguments = [], []
            if self.at("name"):
                parts.append(self.next().text)
            while self.at("keyword"):
                parts.append(self.next().text)
                arguments.append(self.literal_text())
            if not parts or not self.at("binary", ">"):
                raise SmalltalkSyntaxError("expected a pragma, as <name> or <name: literal>", self.token.line)
            found.append(Pragma("".join(parts), arguments, start, self.next().end))
        return found

    def temporaries(self) -> list[str]:
        if self.at("binary", "||"):
            self.next()
            return []
        if not self.at("binary", "|"):
            return []
        self.next()
        names = []
        while self.at("name"):
            names.append(self.next().text)
        if not self.at("binary", "|"):
            raise SmalltalkSyntaxError("temporaries are not closed by |", self.token.line)
        self.next()
        return names

    def statements(self, end: str) -> list[Node]:
        statements: list[Node] = []
        while not self.at(end):
            if statements and isinstance(statements[-1], Return):
                raise SmalltalkSyntaxError("nothing is reached after ^", self.token.line)
            line = self.token.line
            if self.at("^"):
                self.next()
                statements.append(Return(line, self.expression()))
            else:
                statements.append(self.expression())
            if not self.at("."):
                break
            while self.at("."):
                self.next()
        return statements

    # -- expressions --

    def expression(self) -> Node:
        following = self.tokens[self.index + 1] if self.index + 1 < len(self.tokens) else self.token
        if self.at("name") and following.kind == "assign":
            name = self.next()
            self.next()
            return Assignment(name.line, name.text, self.expression())
        return self.cascade()

    def cascade(self) -> Node:
        line = self.token.line
        first = self.keyword_send(self.binary_send(self.unary_send(self.primary())))
        if not self.at(";"):
            return first
        if not isinstance(first, Send):
            raise SmalltalkSyntaxError("a cascade follows a message", self.token.line)
        sends = [first]
        while self.at(";"):
            self.next()
            sends.append(self.cascaded(first.receiver))
        return Cascade(line, sends)

    def cascaded(self, receiver: Node) -> Send:
        line = self.token.line
        if self.at("name"):
            return Send(line, receiver, self.next().text, [], in_cascade=True)
        if self.at("binary"):
            return Send(line, receiver, self.next().text, [self.unary_send(self.primary())], in_cascade=True)
        send = self.keyword_send(receiver)
        if not isinstance(send, Send) or send is receiver:
            raise SmalltalkSyntaxError(f"expected a message after ;, got {self.token.text!r}", line)
        send.in_cascade = True
        return send

    def unary_send(self, receiver: Node) -> Node:
        while self.at("name"):
            receiver = Send(self.token.line, receiver, self.next().text, [])
        return receiver

    def binary_send(self, receiver: Node) -> Node:
        while self.at("binary") or self.at_negative_number():
            line, selector = self.token.line, self.binary_selector()
            receiver = Send(line, receiver, selector, [self.unary_send(self.primary())])
        return receiver

    def at_negative_number(self) -> bool:
        return self.at("number") and self.token.text.startswith("-")

    def binary_selector(self) -> str:
        """After a receiver, as in `x -1`, the sign is a message."""
        if not self.at_negative_number():
            return self.next().text
        number = self.token
        self.tokens[self.index] = Token("number", number.text[1:], number.start + 1, number.line)
        return "-"

    def keyword_send(self, receiver: Node) -> Node:
        line, parts, arguments = self.token.line, [], []
        while self.at("keyword"):
            parts.append(self.next().text)
            arguments.append(self.binary_send(self.unary_send(self.primary())))
        return Send(line, receiver, "".join(parts), arguments) if parts else receiver

    def primary(self) -> Node:
        token = self.token
        if token.kind == "name":
            return Variable(token.line, self.next().text)
        if token.kind in _NAMED_LITERALS:
            return Literal(token.line, token.kind, self.next().text)
        if token.kind in ("#(", "#["):
            return Literal(token.line, "array" if token.kind == "#(" else "bytes", self.literal_text())
        if token.kind == "(":
            self.next()
            inner = self.expression()
            self.take(")", "a closing parenthesis")
            return inner
        if token.kind == "[":
            return self.block()
        if token.kind == "{":
            self.next()
            elements = self.statements("}")
            self.take("}", "a closing brace")
            return Brace(token.line, elements)
        raise SmalltalkSyntaxError(f"expected an expression, got {token.text or 'the end'!r}", token.line)

    def block(self) -> Block:
        line = self.next().line
        arguments = []
        while self.at(":"):
            self.next()
            arguments.append(self.take("name", "the name of a block's argument").text)
        temporaries = []
        if arguments and self.at("binary", "||"):
            self.next()  # the end of the arguments and the beginning of the temporaries
            while self.at("name"):
                temporaries.append(self.next().text)
            self.close_bar()
        else:
            if arguments and not self.at("]"):
                self.close_bar()
            temporaries = self.temporaries()
        statements = self.statements("]")
        self.take("]", "the end of a block")
        return Block(line, arguments, temporaries, statements)

    def close_bar(self) -> None:
        if not self.at("binary", "|"):
            raise SmalltalkSyntaxError(f"expected |, got {self.token.text!r}", self.token.line)
        self.next()

    # -- literals --

    def literal_text(self) -> str:
        """Past one literal, of any depth."""
        token = self.token
        if token.kind in _NAMED_LITERALS or token.kind == "name":
            return self.next().text
        if token.kind == "#[":
            return self.literal_bytes()
        if token.kind not in ("#(", "("):
            raise SmalltalkSyntaxError(f"expected a literal, got {token.text or 'the end'!r}", token.line)
        self.next()
        parts = []
        while not self.at(")"):
            if self.token.kind in ("keyword", "keywords", "binary"):
                parts.append(self.next().text)
            elif self.at("["):
                parts.append(self.literal_bytes())
            else:
                parts.append(self.literal_text())
        self.next()
        return f"#({' '.join(parts)})"

    def literal_bytes(self) -> str:
        self.next()
        parts = []
        while not self.at("]"):
            parts.append(self.take("number", "a byte").text)
        self.next()
        return f"#[{' '.join(parts)}]"
