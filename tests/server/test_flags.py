"""The command line of the server: what it accepts, warns of and refuses, and what reaches the server of it."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex

import pytest

from mooli import EngineConfig, UnknownArgumentError, cli, launch_server
from mooli.errors import ConfigError
from mooli.server import command, launch
from mooli.server.config import ServerConfig
from mooli.sglang_arguments import (
    HINT_VALUES,
    HINTS,
    LISTS,
    REFUSED,
    SERVER_ARGUMENTS,
    SWITCHES,
    asks_for_nothing,
)

# The options that scripts for SGLang 0.5.23 and 0.5.6 may name, as far as they concern one language model.
_SGLANG_FLAGS = """
model-path model tokenizer-path tokenizer-mode tokenizer-worker-num detokenizer-worker-num skip-tokenizer-init
load-format model-loader-extra-config json-model-override-args trust-remote-code revision download-dir context-length
is-embedding enable-multimodal model-impl dtype quantization kv-cache-dtype device host port fastapi-root-path
ssl-keyfile ssl-certfile ssl-ca-certs ssl-keyfile-password enable-http2 grpc-port smg-grpc-mode tp-size
tensor-parallel-size tp dp-size data-parallel-size dp attn-dp-size enable-dp-attention pp-size pipeline-parallel-size
pp ep-size expert-parallel-size ep load-balance-method nnodes node-rank dist-init-addr nccl-init-addr nccl-port
dist-timeout base-gpu-id gpu-id-step mem-fraction-static max-running-requests max-queued-requests max-total-tokens
chunked-prefill-size max-prefill-tokens prefill-max-requests enable-mixed-chunk num-continuous-decode-steps
scheduler-recv-interval schedule-policy schedule-conservativeness enable-priority-scheduling
schedule-low-priority-values-first priority-scheduling-preemption-threshold disable-priority-preemption
default-priority-value abort-on-priority-when-disabled retraction-policy page-size disable-radix-cache
radix-eviction-policy radix-eviction-policy-config disable-overlap-schedule attention-backend
enable-strict-thinking prefill-attention-backend decode-attention-backend sampling-backend grammar-backend
random-seed served-model-name
weight-version api-key admin-api-key chat-template hf-chat-template-name completion-template
default-chat-template-kwargs trust-request-chat-template reasoning-parser tool-call-parser tool-server
enable-response-store sampling-defaults stream-interval incremental-streaming-output
stream-response-default-include-usage enable-cache-report enable-metrics decode-log-interval
bucket-time-to-first-token bucket-inter-token-latency bucket-e2e-request-latency extra-metric-labels log-level
log-level-http log-requests log-requests-level log-requests-format log-requests-target crash-dump-folder
show-time-cost enable-trace otlp-traces-endpoint watchdog-timeout soft-watchdog-timeout sleep-on-idle
skip-server-warmup warmups constrained-json-whitespace-pattern constrained-json-disable-any-whitespace
cuda-graph-backend-decode cuda-graph-backend-prefill cuda-graph-max-bs-decode cuda-graph-max-bs-prefill
cuda-graph-bs-decode cuda-graph-bs-prefill disable-cuda-graph cuda-graph-max-bs cuda-graph-bs enable-torch-compile
torch-compile-max-bs cpu-offload-gb enable-memory-saver enable-deterministic-inference enable-lora lora-paths
max-lora-rank lora-target-modules max-loras-per-batch max-loaded-loras lora-eviction-policy lora-backend
speculative-algorithm speculative-draft-model-path speculative-num-steps speculative-eagle-topk
speculative-num-draft-tokens speculative-accept-threshold-single speculative-accept-threshold-acc
speculative-token-map speculative-ngram-max-trie-depth speculative-ngram-capacity speculative-ngram-match-type
enable-hierarchical-cache enable-hicache hicache-ratio hicache-size hicache-write-policy hicache-io-backend
hicache-mem-layout hicache-storage-backend hicache-storage-prefetch-policy hicache-storage-backend-extra-config
enable-lmcache enable-flexkv disaggregation-mode disaggregation-transfer-backend disaggregation-bootstrap-port
stream-output torchao-config enable-nan-detection collect-tokens-histogram debug-tensor-dump-inject
disaggregation-decode-dp disaggregation-decode-tp disaggregation-prefill-pp enable-double-sparsity
ds-channel-config-path ds-heavy-channel-num ds-heavy-token-num ds-heavy-channel-type ds-sparse-decode-threshold
hybrid-kvcache-ratio nsa-prefill-backend nsa-decode-backend enable-piecewise-cuda-graph
piecewise-cuda-graph-max-tokens piecewise-cuda-graph-tokens piecewise-cuda-graph-compiler load-watch-interval
prefill-round-robin-balance speculative-ngram-branch-length speculative-ngram-min-match-window-size
speculative-ngram-max-match-window-size
"""
SGLANG_FLAGS = _SGLANG_FLAGS.split()

COMMANDS = {"launch_server": launch_server.main, "serve": lambda argv: cli.main(["serve", *argv])}


class Started:
    """What a command would have started."""

    server: ServerConfig
    engine: EngineConfig
    command: list[str]


@pytest.fixture
def start(monkeypatch):
    """Runs a command line with a server that ends at once with status 7: start("--port 1", command="serve")."""
    started = Started()

    def run(server_config, engine_config, argv, child):
        assert child is None
        started.server, started.engine, started.command = server_config, engine_config, list(argv)
        return 7

    def start(line="", command="launch_server"):
        assert COMMANDS[command](shlex.split(line) if isinstance(line, str) else line) == 7
        return started

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr("mooli.engine.child.EngineChild", contextlib.nullcontext)
    return start


@pytest.fixture
def refused(start, capsys):
    """The one line on standard error of a command line that starts nothing."""

    def refused(line, command="launch_server"):
        argv = shlex.split(line) if isinstance(line, str) else line
        try:
            status = COMMANDS[command](argv)
        except SystemExit as exc:
            status = exc.code
        out, err = capsys.readouterr()
        assert (status, out) == (2, "")
        assert err.count("\n") == 1
        return err

    return refused


@pytest.mark.parametrize("command", COMMANDS)
def test_the_line_of_the_documentation_works(start, command):
    started = start(
        "--model-path M --tp 1 --port 30000 --host 0.0.0.0 --backend cpu --dtype float16 --mem-fraction-static 0.9",
        command,
    )
    assert started.server == ServerConfig(host="0.0.0.0", port=30000)
    assert started.engine == EngineConfig(
        model_path="M", device="cpu", dtype="float16", mem_fraction_static=0.9, log_level="info", kv_cache_dir="auto"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_sglangs_name_of_a_cache_on_disk_is_taken(start, command):
    started = start("--hicache-storage-backend file --enable-hierarchical-cache --hicache-ratio 2.0", command)
    assert started.engine.hicache_storage_backend == "file" and started.engine.kv_cache_dir == "auto"


@pytest.mark.parametrize("command", COMMANDS)
def test_memory_of_the_host_below_a_device_is_asked_for_as_in_sglang(start, capsys, command):
    line = "--enable-hicache --hicache-ratio 1.5 --hicache-size 0 --hicache-write-policy write_back"
    engine = start(f"{line} --device npu", command).engine
    assert engine.enable_hierarchical_cache and (engine.hicache_ratio, engine.hicache_size) == (1.5, 0)
    assert engine.hicache_write_policy == "write_back" and capsys.readouterr().err == ""
    engine = start(line, command).engine
    assert not engine.enable_hierarchical_cache and engine.hicache_ratio is None
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 3 and all("no effect on device 'cpu': the KV cache lies in the host" in w for w in warnings)


@pytest.mark.parametrize("command", COMMANDS)
def test_with_nothing_said_the_demo_model_is_served(start, command):
    started = start("", command)
    assert (started.engine.model_path, started.engine.log_level) == ("demo", "info")
    assert (started.server.host, started.server.port) == ("127.0.0.1", 30000)


@pytest.mark.parametrize("line", ["M", "M --port 1", "--port 1 M", "--port 1 M --tp 1", "--disable-cuda-graph M"])
def test_serve_takes_the_model_as_a_bare_word(start, line):
    assert start(line, "serve").engine.model_path == "M"


def test_a_model_named_twice_is_refused(refused):
    assert "the model is given twice" in refused("M --model-path N", "serve")
    assert "a model behind --model" in refused("M")
    assert "'N' is more than this command takes" in refused("M N", "serve")


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("--model x", "model_path", "x"),
        ("--tensor-parallel-size 1", "tp_size", 1),
        ("--dp 1", "dp_size", 1),
        ("--stream-output", "incremental_streaming_output", True),
        ("--context-length 4Ki", "context_length", 4096),
        ("--max-total-tokens=1k", "max_total_tokens", 1000),
        ("--chunked-prefill-size -1", "chunked_prefill_size", -1),
        ("--mem 0.5", "mem_fraction_static", 0.5),
        ("--served x", "served_model_name", "x"),
        ("--max-body-bytes 1Mi", "max_body_bytes", 2**20),
        ("--request-timeout 1", "request_timeout", 1.0),
        ("--bucket-time-to-first-token 0.1 0.5 1", "bucket_time_to_first_token", (0.1, 0.5, 1.0)),
        ("--enable-metrics", "enable_metrics", True),
        ("""--default-chat-template-kwargs '{"a": 1}'""", "chat_template_kwargs", {"a": 1}),
        ("--cors-allow-origins 'http://a, https://b:1'", "cors_origins", ("http://a", "https://b:1")),
        ("--allowed-hosts 'a, b.example'", "host_names", ("a", "b.example")),
        ("--api-keys-file keys.yaml", "api_keys_file", "keys.yaml"),
    ],
)
def test_flags_have_aliases_abbreviations_and_suffixes(start, line, name, value):
    started = start(line)
    assert getattr(started.server if hasattr(started.server, name) else started.engine, name) == value


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--ssl-key x", "ambiguous option: --ssl-key could match --ssl-keyfile, --ssl-keyfile-password"),
        ("--enable-lo", "--enable-lora is known to SGLang but not supported by Mooli yet: remove it"),
        ("--speculative-algorithm EAGLE", "invalid choice: 'EAGLE'"),
        ("--speculative-eagle-topk 4", "known to SGLang but not supported"),
        ("--speculative-num-draft-tokens 4", "has no effect without speculative_algorithm"),
        ("--pp 2", "--pp is known to SGLang"),
        ("--tokenizer-mode slow", "--tokenizer-mode is known to SGLang"),
        ("--prot 1", "there is no flag --prot; did you mean --port?"),
        ("--model_path x", "did you mean --model-path?"),
        ("--port", "expected one argument"),
        ("--port x", "invalid int value: 'x'"),
        ("--port 65536", "the most is 65535"),
        ("--tp 2", "use tp_size=1"),
        ("--nnodes 2", "one model runs on one machine"),
        ("--dist-init-addr 10.0.0.1:5000", "one model runs on one machine"),
        ("--base-gpu-id 1", "choose devices with ASCEND_RT_VISIBLE_DEVICES"),
        ("--gpu-id-step 2", "choose devices with ASCEND_RT_VISIBLE_DEVICES"),
        ("--dtype int9", "invalid choice: 'int9'"),
        ("--attention-backend nonsense", "invalid choice: 'nonsense'"),
        ("--max-header-bytes 8z", "'8z' is not a number like"),
        ("--config missing.yaml", "--config missing.yaml: No such file or directory"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_command_line_is_one_line_and_status_2(refused, line, message, command):
    assert message in refused(line, command)


@pytest.mark.parametrize("flag", SGLANG_FLAGS)
def test_every_flag_of_sglang_is_decided(flag):
    name = flag.replace("-", "_")
    works = name in ServerConfig.names() or name in EngineConfig.names()
    assert [works, name in HINTS, name in REFUSED].count(True) == 1


def test_no_decision_is_about_a_flag_that_nobody_names():
    ours = {
        "model_type",
        "strip_thinking_cache",
        "speculative_ngram_max_bfs_breadth",
        "speculative_ngram_min_bfs_breadth",
    }
    assert {*HINTS, *REFUSED} - {flag.replace("-", "_") for flag in SGLANG_FLAGS} == ours
    assert {*HINTS, *REFUSED} >= SWITCHES | LISTS
    assert {item.name for item in dataclasses.fields(ServerConfig)} == SERVER_ARGUMENTS


def words_for(name):
    flag = f"--{name.replace('_', '-')}"
    return [flag] if name in SWITCHES else [flag, "1", "2"] if name in LISTS else [flag, "7"]


@pytest.mark.parametrize("name", sorted(HINTS))
def test_a_hint_is_accepted_with_one_line_that_says_why(start, capsys, name):
    assert start([*words_for(name), "--port", "1"]).server.port == 1
    assert capsys.readouterr().err == f"mooli: warning: {words_for(name)[0]} has no effect in Mooli: {HINTS[name]}\n"


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_asks_for_a_missing_feature_is_refused(refused, name):
    assert f"{words_for(name)[0]} is known to SGLang but not supported by Mooli yet" in refused(words_for(name))


@pytest.mark.parametrize(
    "line",
    [
        "--pp-size 1",
        "--nnodes 1 --node-rank 0",
        "--base-gpu-id 0 --gpu-id-step 1",
        "--tokenizer-mode auto",
        "--disaggregation-mode null",
    ],
)
def test_what_asks_for_nothing_is_accepted_without_a_word(start, capsys, line):
    start(line)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, (values, _) in HINT_VALUES.items() for v in sorted(values)])
def test_a_library_of_kernels_is_a_hint(start, capsys, name, value):
    flag = f"--{name.replace('_', '-')}"
    assert getattr(start([flag, value]).engine, name) is None
    assert capsys.readouterr().err.startswith(f"mooli: warning: {flag} {value} has no effect in Mooli: ")


def test_the_engine_says_of_server_arguments_whose_they_are():
    for name in SERVER_ARGUMENTS:
        with pytest.raises(UnknownArgumentError, match=f"{name} is an argument of the server"):
            EngineConfig.from_kwargs(model_path="m", **{name: "x"})
        assert EngineConfig.from_kwargs(model_path="m", **{name: None}) == EngineConfig(model_path="m")


def test_other_commands_say_of_server_flags_whose_they_are(capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--port", "1"])
    assert "--port is a flag of `mooli serve`" in capsys.readouterr().err


def test_values_that_ask_for_nothing_are_told_from_those_that_only_look_so():
    assert asks_for_nothing("pp_size", 1)
    assert not asks_for_nothing("pp_size", True)
    assert not asks_for_nothing("pp_size", 1.0)
    assert not asks_for_nothing("enable_lora", 0)


# -- the file --


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "server.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_a_file_gives_arguments_and_the_command_line_wins(start, file):
    path = file(
        """
        model: from-file
        port: 1
        max_total_tokens: 8k
        mem-fraction-static: 1
        disable-radix-cache: true
        preferred_sampling_params: {top_p: 0.5}
        bucket-inter-token-latency: [0.1, 1]
        cors-allow-origins: [http://a, http://b]
        allowed-hosts: [a, b]
        api-key: secret
        admin-api-key: null
        """
    )
    started = start(["--config", str(path), "--port", "2", "--model-path", "from-line"])
    assert started.server == ServerConfig(
        port=2,
        bucket_inter_token_latency=(0.1, 1.0),
        cors_allow_origins="http://a,http://b",
        allowed_hosts="a,b",
        api_key="secret",
    )
    assert started.engine.model_path == "from-line"
    assert started.engine.max_total_tokens == 8000
    assert started.engine.mem_fraction_static == 1.0
    assert started.engine.disable_radix_cache
    assert started.engine.preferred_sampling == {"top_p": 0.5}


def test_an_empty_file_says_nothing(start, file):
    assert start(["--config", str(file("# nothing\n"))]).server == ServerConfig()


def test_of_device_and_backend_the_command_line_wins_too(start, file):
    assert start(["--config", str(file("device: npu")), "--backend", "cpu"]).engine.device == "cpu"


def test_hints_in_a_file_are_warned_of_unless_they_are_off(start, file, capsys):
    path = file("cuda-graph-max-bs: 8\nenable_torch_compile: false\nattention_backend: triton\npp-size: 1\n")
    assert start(["--config", str(path)]).engine.attention_backend is None
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" has no effect")[0] for line in lines] == [
        f"mooli: warning: cuda-graph-max-bs in {path}",
        "mooli: warning: --attention-backend triton",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "there is no argument 'prot'; did you mean port?"),
        ("max-total-token: 1", "did you mean max-total-tokens?"),
        ("port: 1\nport: 2", "not valid YAML in line 2, column 1: 'port' is given twice"),
        ("json_model_override_args: {a: 1, a: 2}", "'a' is given twice"),
        ("tp: 1\ntp-size: 1", "tp_size is given twice, once as tp-size"),
        ("port: [1", "not valid YAML in line 1"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("- port", "a mapping of arguments to values, not a list"),
        ("port", "not a str"),
        ("1: 2", "there is no argument 1"),
        ("port: !!python/object/apply:os.getpid []", "not valid YAML"),
        ("enable-lora: true", "known to SGLang but not supported"),
        ("port: '1'", "port must be of type int, got '1'"),
        ("log-requests: 1", "log_requests must be of type bool"),
        ("preferred_sampling_params: [1]", "must be a JSON object"),
        (b"port: \xff", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(refused, file, text, message):
    path = file(text)
    assert message in refused(["--config", str(path)]).replace(str(path), "FILE")


@pytest.mark.parametrize("text", ["api-key: 'se cret", "api-key: 5ecret\nport: [", "api-key: 5432", "api-key: se cret"])
def test_a_key_in_a_file_that_cannot_be_used_is_not_shown(refused, file, text):
    message = refused(["--config", str(file(text))])
    assert not any(word in message for word in ("se cret", "5ecret", "5432"))


# -- secrets --


@pytest.mark.parametrize(
    "words", [["--api-key", "5ecret"], ["--api-key=5ecret"], ["--adm", "5ecret"], ["--admin=5ecret"]]
)
@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_reaches_the_server_without_its_keys(start, words, command):
    started = start([*words, "--port", "1"], command)
    assert "5ecret" in (started.server.api_key, started.server.admin_api_key)
    assert "5ecret" not in str(started.command)
    assert started.command[-2:] == ["--port", "1"]
    assert started.command[: 2 if command == "serve" else 3] == (
        ["mooli", "serve"] if command == "serve" else ["python3", "-m", "mooli.launch_server"]
    )


def test_what_only_begins_like_a_secret_flag_is_shown():
    assert command.redacted(["--", "x", "--host", "h", "-a", "b"]) == ["--", "x", "--host", "h", "-a", "b"]


# -- how it ends --


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConfigError("no such\nthing"), "no such thing"),
        (OSError(28, "No space"), "the server has ended: [Errno 28] No space"),
    ],
    ids=["ours", "the system's"],
)
def test_a_server_that_cannot_start_is_one_line_and_status_2(monkeypatch, capsys, command, error, message):
    def run(*_):
        raise error

    monkeypatch.setattr(launch, "run", run)
    assert COMMANDS[command]([]) == 2
    assert capsys.readouterr() == ("", f"mooli: error: {message}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_before_the_server_runs_is_130(monkeypatch, command):
    def run(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "run", run)
    assert COMMANDS[command]([]) == 130


def test_serving_needs_no_standard_output(start, monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    start("", "serve")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_groups_the_flags_by_subject_and_shows_only_what_works(capsys, command):
    with pytest.raises(SystemExit) as raised:
        COMMANDS[command](["--help"])
    assert raised.value.code == 0
    text = capsys.readouterr().out
    for heading in ("model:", "address:", "access:", "TLS:", "memory and batching:", "limits:", "metrics:"):
        assert text.count(f"\n{heading}\n") == 1
    for item in (*dataclasses.fields(ServerConfig), *dataclasses.fields(EngineConfig)):
        assert f"--{item.name.replace('_', '-')}" in text
    assert "--enable-lora" not in text
    assert "triton" not in text
