"""Settings from the kernel command line: what is taken, what is refused, what ends a boot."""

import pytest

from guestagent.api.agent import AGENT_PORT
from guestagent.api.console import CONSOLE_PORT
from guestagent.config import KEYS, Config, parse_command_line, read_settings


def settings(*texts: str) -> tuple[tuple[str, str], ...]:
    return parse_command_line(" ".join(f"guestagent.{text}" for text in texts))


def test_command_line_yields_the_settings_of_guestagent_in_order() -> None:
    line = 'quiet guestagent.log=debug root=/dev/vda guestagent.listen="vsock://any:5" x.y=1'
    assert parse_command_line(line) == (("log", "debug"), ("listen", "vsock://any:5"))


def test_quotes_may_hold_spaces() -> None:
    assert parse_command_line('guestagent.a="b c" guestagent.d') == (("a", "b c"), ("d", ""))


def test_quotes_are_taken_off_as_the_kernel_does() -> None:
    """Around a word or a value; any other quote is a character of the value."""
    line = '"guestagent.a=b c" guestagent.d=e"f g"h guestagent.i="j'
    assert parse_command_line(line) == (("a", "b c"), ("d", 'e"f g"h'), ("i", "j"))


def test_words_after_two_dashes_are_for_the_init() -> None:
    line = "guestagent.require_verity=1 -- guestagent.port=5"
    assert parse_command_line(line) == (("require_verity", "1"),)


def test_faults_are_taken_only_by_a_boot_image_for_tests() -> None:
    asked = settings("fault=mount:EIO")
    assert read_settings(asked)[0].fault == "mount:EIO"
    config, problems = read_settings(asked, faults=False)
    assert config == Config()
    assert [(problem.key, problem.fatal) for problem in problems] == [("guestagent.fault", True)]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("port=1024", "port=1025"),
        ("port=1024", "listen=vsock://any:1025"),
        ("dial=2:1", "dial=2:2"),
        ("log_dial=2:1", "log_dial=2:2"),
        ("modules=/a.ko", "modules=/b.ko"),
        ("state=/run/a", "state=/run/b"),
        ("agent=end", "agent=stay"),
        ("log=error", "log=debug"),
        ("log_to=kmsg", "log_to="),
        ("deadline=5", "deadline=6"),
        ("rcu_expedited=0", "rcu_expedited=1"),
        ("overlay=a", "overlay=b"),
    ],
)
def test_appended_text_turns_no_setting(first: str, second: str) -> None:
    config, problems = read_settings(settings(first, second))
    assert config == read_settings(settings(first))[0]
    name = f"guestagent.{second.partition('=')[0]}"
    guards = next(key for key in KEYS if f"guestagent.{key.name}" == name).guards_security
    assert [(problem.key, problem.fatal) for problem in problems] == [(name, guards)]
    assert "given twice, and not the same" in problems[0].text


def test_of_every_setting_that_does_not_add_up_a_second_value_is_a_problem() -> None:
    """The same value again is none. No setting may be turned by text that is appended."""
    assert {key.name for key in KEYS if key.repeat} == {"layer", "manifest", "net"}


def test_the_default_ports_are_for_privileged_processes() -> None:
    """The kernel refuses ports up to 1023 to processes without CAP_NET_BIND_SERVICE."""
    assert Config().listen == (f"vsock://any:{AGENT_PORT}",)
    assert max(AGENT_PORT, CONSOLE_PORT) <= 1023
    assert AGENT_PORT != CONSOLE_PORT


def test_defaults_when_nothing_is_said() -> None:
    assert read_settings(()) == (Config(), ())


def test_every_key_names_a_field() -> None:
    for key in KEYS:
        assert hasattr(Config(), key.field), key.name


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("port=7", "listen", ("vsock://any:7",)),
        ("listen=unix:///run/a,vsock://any:9", "listen", ("unix:///run/a", "vsock://any:9")),
        ("dial=2:1024", "dial", ("vsock://2:1024",)),
        ("require_verity", "require_verity", "yes"),
        ("require-verity=0", "require_verity", "no"),
        ("require_verity=full", "require_verity", "full"),
        ("target_root=/run/", "target_roots", ("/run",)),
        ("target_root=/run/a,/srv/b/", "target_roots", ("/run/a", "/srv/b")),
        ("deadline=5", "deadline_seconds", 5),
        ("modules=/a.ko,/b.ko", "modules", ("/a.ko", "/b.ko")),
        ("agent=stay", "agent", "stay"),
    ],
)
def test_a_setting_is_taken(text: str, field: str, value: object) -> None:
    config, problems = read_settings(settings(text))
    assert problems == ()
    assert getattr(config, field) == value


def test_layers_gather() -> None:
    root = "00" * 32
    config, problems = read_settings(
        settings(f"layer=pmem:0,root={root}", f"layer=pmem:1,root={root}", "log=error", "log=error")
    )
    assert problems == ()
    assert len(config.layers) == 2
    assert config.log == "error"


def test_the_file_of_a_signature_is_not_read_with_the_settings() -> None:
    text = f"layer=pmem:0,root={'00' * 32},signature"
    config, problems = read_settings(settings(f"{text}=/etc/base.p7s"))
    assert problems == ()
    assert config.layers == (f"{text}=/etc/base.p7s".removeprefix("layer="),)
    (problem,) = read_settings(settings(f"{text}=base.p7s"))[1]
    assert problem.fatal
    assert "signature 'base.p7s' is no absolute path" in problem.text


def test_a_guarding_setting_cannot_be_turned_by_a_second_one() -> None:
    config, problems = read_settings(settings("require_verity=1", "require_verity=0"))
    assert [problem.fatal for problem in problems] == [True]
    assert config.require_verity == "yes"
    assert read_settings(settings("require_verity=1", "require_verity"))[1] == ()


@pytest.mark.parametrize(
    ("text", "fatal"),
    [
        ("log=loud", False),
        ("deadline=0", False),
        ("port=99999999999", True),
        ("nonsense=1", False),
        ("require_verity=maybe", True),
        ("target_root=run", True),
        ("target_root=/run,", True),
        ("target_root=/run/../etc", True),
        ("layer=pmem:0", True),
        ("layer=pmem:0,root=xyz", True),
        ("layer=pmem:0,root=none,preset=strict", True),
        ("layer=pmem:0,root=" + "00" * 32 + ",offset=0", True),
        ("layer=pmem:0,root=" + "00" * 32 + ",color=red", True),
        ("overlay=root,layer=a", True),
        ("on_failure=carry-on", True),
        ("fault=x:ENOSUCHERRNO", True),
    ],
)
def test_a_setting_is_refused(text: str, fatal: bool) -> None:
    config, problems = read_settings(settings(text))
    assert config == Config()
    (problem,) = problems
    assert problem.fatal is fatal
    assert problem.text.startswith(problem.key)
