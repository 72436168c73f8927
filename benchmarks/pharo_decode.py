"""How fast Smalltalk makes tensors of a capture: base64 against nested lists, under Amber on Node.

    PYTHONPATH=tests python benchmarks/pharo_decode.py --layers 24 --tokens 100 --width 1024

The residual of every layer, random numbers, lies in one reply of a server that only replays. The image reads the reply
in each encoding; what is timed is the one expression that makes tensors of it, and, beside it, the whole from the
request to tensors. The ways take turns, round after round. No Pharo runs here: what is printed at the end does the
same in a Pharo playground. The figures go to docs/benchmarks.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from page import PAGE, busy, environment, write_section
from smalltalk_image import Image, canned_server, literal
from tqdm import tqdm

from neuroscope_bridge.payload import dumps, encode_activation

CHUNK_FILE = Path(__file__).parent.parent / "neuroscope_bridge" / "templates" / "LMStudioRESTClient.st"
EXPRESSION = "client convertActivationsForNeuroScope: activations"
LISTS = "nested lists"
WAYS = {"base64, float32": ("base64", "float32"), "base64, float16": ("base64", "float16"), LISTS: ("json", "float32")}

PLAYGROUND = """\
client := LMStudioRESTClient default.
random := Random seed: 1.
record := [ :dtype :encoding :data |
	Dictionary new
		at: 'hook_id' put: 'r';
		at: 'dtype' put: dtype;
		at: 'shape' put: #( 1 {tokens} {width} );
		at: 'encoding' put: encoding;
		at: 'data' put: data;
		yourself ].
base64 := [ :size | ((1 to: size) collect: [ :each | (random nextInteger: 256) - 1 ]) asByteArray base64Encoded ].
lists := (1 to: {tokens}) asArray collect: [ :row | (1 to: {width}) asArray collect: [ :each | random next ] ].
(Array
	with: (record value: 'float32' value: 'base64' value: (base64 value: 4 * {numbers}))
	with: (record value: 'float16' value: 'base64' value: (base64 value: 2 * {numbers}))
	with: (record value: 'float32' value: 'json' value: (Array with: lists)))
	collect: [ :each |
		| activations |
		activations := Dictionary new.
		activations at: 'r' put: ((1 to: {layers}) asArray collect: [ :layer | each ]).
		[ {expression} ] timeToRun ]"""


@dataclass(frozen=True)
class Capture:
    """Residuals of `layers` layers, (1, tokens, width) each."""

    layers: int
    tokens: int
    width: int

    @property
    def megabytes(self) -> float:
        """Of float32 numbers, however they travel."""
        return self.layers * self.tokens * self.width * 4 / 1e6

    def arrays(self) -> np.ndarray:
        return np.random.default_rng(0).standard_normal((self.layers, 1, self.tokens, self.width), np.float32)

    def reply(self, encoding: str, dtype: str) -> str:
        """The JSON of the activations."""
        records = {}
        for layer, array in enumerate(self.arrays()):
            encoded = encode_activation(
                array,
                hook_id=f"layer_{layer}_residual",
                layer_name=f"transformer.h.{layer}",
                component="residual",
                hook_point=f"blocks.{layer}.hook_resid_post",
                layer_index=layer,
                axes=("batch", "pos", "d_model"),
                phase="prefill",
                step=0,
                positions=(0, self.tokens),
                is_input=False,
                encoding=encoding,
                dtype=dtype,
            )
            records[encoded["hook_id"]] = [encoded]
        return json.dumps(json.loads(dumps({"activations": records})))


def script(base_url: str, path: str, layers: int) -> str:
    """Milliseconds for reading the reply and for the expression, and of each layer's tensor its sum and one number."""
    return (
        f"client := LMStudioRESTClient baseUrl: {literal(base_url)}."
        f"reading := Date millisecondsToRun: [ activations := (client modelInfo: {literal(path)}) at: 'activations' ]."
        f"decoding := Date millisecondsToRun: [ tensors := {EXPRESSION} ]."
        f"numbers := (1 to: {layers}) collect: [ :each |"
        "    tensor := (tensors at: 'layer_', (each - 1) printString, '_residual') first."
        "    { tensor sum. tensor at: #( 1 2 3 ) } ]."
        "{ reading. decoding. numbers }"
    )


def check(found: list[list[float]], capture: Capture, label: str) -> None:
    """What the image holds must be what was sent."""
    arrays = capture.arrays().astype(np.float16 if "float16" in label else np.float32).astype(np.float64)
    expected = np.stack([arrays.sum((1, 2, 3)), arrays[:, 0, 1, 2]], axis=-1)
    if not np.allclose(found, expected, rtol=1e-9, atol=1e-6):
        raise SystemExit("What came is not what was sent.")


def measure(capture: Capture, rounds: int) -> tuple[dict[str, tuple[float, float]], dict[str, int]]:
    """Seconds for the expression and for all from the request on, medians, and the bytes of the reply, by way."""
    replies = {label: capture.reply(*way) for label, way in WAYS.items()}
    seconds: dict[str, list[tuple[float, float]]] = {label: [] for label in WAYS}
    served = {f"GET /v1/models/{index}": (200, replies[label]) for index, label in enumerate(WAYS)}
    with canned_server(served) as server, Image(CHUNK_FILE) as image:
        for turn in tqdm(range(rounds + 1), file=sys.stderr):
            for index, label in enumerate(WAYS):
                reading, decoding, found = image.evaluate(script(server.base_url, str(index), capture.layers))
                check(found, capture, label)
                if turn:  # the first warms up
                    seconds[label].append((decoding / 1e3, (reading + decoding) / 1e3))
    medians = {
        label: (statistics.median(each for each, _ in spent), statistics.median(each for _, each in spent))
        for label, spent in seconds.items()
    }
    return medians, {label: len(reply) for label, reply in replies.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--print-only", action="store_true", help="leave docs/benchmarks.md as it is")
    options = parser.parse_args()
    capture = Capture(options.layers, options.tokens, options.width)
    load = busy()
    results, sizes = measure(capture, options.rounds)
    rows = [["how the numbers travel", "bytes of JSON", "decoding, MB/s", "times lists", "whole, MB/s", "times lists"]]
    rows.append(["---"] * 6)
    for label, (decoding_s, whole_s) in results.items():
        rates = [f"{capture.megabytes / decoding_s:.3g}", f"{results[LISTS][0] / decoding_s:.2f}"]
        rates += [f"{capture.megabytes / whole_s:.3g}", f"{results[LISTS][1] / whole_s:.2f}"]
        rows.append([label, f"{sizes[label]:,}", *rates])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    playground = PLAYGROUND.format(
        layers=capture.layers,
        tokens=capture.tokens,
        width=capture.width,
        numbers=capture.tokens * capture.width,
        expression=EXPRESSION,
    )
    arguments = f"--layers {capture.layers} --tokens {capture.tokens} --width {capture.width} --rounds {options.rounds}"
    text = f"""\
`PYTHONPATH=tests python benchmarks/pharo_decode.py {arguments}`

{environment("numpy")} Node {node}.
This is Amber on Node, not Pharo: the package's own code, but with JavaScript's numbers, and with JSON and HTTP of
Node's instead of STON's and Zinc's. The residual of {capture.layers} layers, {capture.tokens} tokens,
{capture.width} wide: {capture.megabytes:.3g} MB of float32. Decoding is `{EXPRESSION}`,
from a reply that is read already to tensors; the whole begins with the request. MB/s are of float32 numbers, however
they travel. Medians of {options.rounds} rounds; {load}.

{table}

In a Pharo playground this answers the three times of decoding:

```smalltalk
{playground}
```
"""
    print(f"\n{text}")
    if not options.print_only:
        write_section("Tensors in Smalltalk", text)
        print(f"Written to {PAGE}.")


if __name__ == "__main__":
    main()
