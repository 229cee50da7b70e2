"""The command line is frozen: a new flag is a decision, made by editing this list in the same change."""

from __future__ import annotations

import argparse

import pytest

from xllm.cli.main import COMMANDS, main, parser_for

MAX_FLAGS = 60

SETTINGS = """
--model --tokenizer --revision --served-model-name --dtype --quantize --load-format
--max-model-len --chat-template --seed --kv-cache-memory-bytes --num-pages --kv-cache-dtype --kv-memory
--enable-prefix-caching --max-num-seqs --max-num-batched-tokens --enable-chunked-prefill
--scheduling-policy --async-scheduling --max-num-queued-reqs --logits-processors --platform --num-threads
--programs --cpus --config
""".split()

SERVING = """
--router-policy --max-num-inflight-reqs --shutdown-timeout-s --instances --registry --cluster-key-file
--listen
--host --port --api-key --allowed-hosts --ssl-certfile --ssl-keyfile --log-level
""".split()

FLAGS = {
    "serve": {*SETTINGS, *SERVING},
    "service": {"--config", *SERVING} - {"--instances", "--listen"},
    "instance": {
        *SETTINGS,
        "--registry",
        "--cluster-key-file",
        "--listen",
        "--shutdown-timeout-s",
        "--log-level",
    },
    "chat": {*SETTINGS, "--base-url", "--api-key", "--system", "--temperature", "--max-tokens"},
    "bench serve": set(
        """
        --base-url --model --api-key --endpoint --dataset-name --dataset-path --input-len --output-len
        --num-prompts --request-rate --burstiness --trace-speedup --max-concurrency --num-warmups --goodput
        --seed --json
        """.split()
    ),
    "bench throughput": {*SETTINGS, "--input-len", "--output-len", "--num-prompts", "--json"},
    "bench latency": {*SETTINGS, "--input-len", "--output-len", "--batch-size", "--num-iters", "--json"},
    "explain": {"--base-url", "--api-key", "--json"},
    "doctor": {*SETTINGS, *SERVING},
    "list": set(),
    "pull": {"--revision"},
}


def visible_flags(parser: argparse.ArgumentParser) -> set[str]:
    """The first spelling of each flag that help lists; aliases are no new flags."""
    return {
        action.option_strings[0]
        for action in parser._actions
        if action.option_strings and action.help != argparse.SUPPRESS and action.dest != "help"
    }


def leaves() -> dict[str, argparse.ArgumentParser]:
    found: dict[str, argparse.ArgumentParser] = {}
    for name in COMMANDS:
        parser, _ = parser_for(name)
        below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if below:
            found |= {f"{name} {sub}": p for sub, p in below[0].choices.items()}
        else:
            found[name] = parser
    return found


def test_the_flags_of_every_command_are_the_frozen_ones() -> None:
    assert {name: visible_flags(parser) for name, parser in leaves().items()} == FLAGS


def test_there_are_few_enough_flags_to_read() -> None:
    assert len(set().union(*FLAGS.values())) <= MAX_FLAGS


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([name, "--help"])
    assert exit_info.value.code == 0
    assert "usage: xllm" in capsys.readouterr().out


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sreve"]) == 2
    assert "sreve" in capsys.readouterr().err
