"""Reading apt's files and answers, and the plan that follows from them, on samples of the releases we meet."""

import pytest
import system

DEBIAN_12 = """\
Types: deb
# https://snapshots.example.org/archive/debian/20250520T000000Z
URIs: https://mirror.example.org/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: https://mirror.example.org/debian-security
Suites: bookworm-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""
DEBIAN_11 = """\
# deb cdrom:[Debian GNU/Linux 11 _Bullseye_]/ bullseye main

deb http://mirror.example.org/debian bullseye main contrib # the main one
deb-src http://mirror.example.org/debian bullseye main
deb http://mirror.example.org/debian bullseye-updates main
deb [arch=amd64,arm64 signed-by=/etc/apt/keyrings/x.gpg] https://tools.example.com/linux/debian bullseye main
deb http://mirror.example.org/debian-security bullseye-security main
"""
UBUNTU_24 = """\
Types: deb deb-src
URIs: http://archive.example.org/ubuntu
Suites: noble noble-updates noble-backports
Components: main restricted universe multiverse
Signed-By: /usr/share/keyrings/ubuntu-archive-keyring.gpg

Enabled: no
Types: deb
URIs: http://off.example.org/ubuntu
Suites: noble
Components: main
"""
EMBEDDED_KEY = """\
Types: deb
URIs: https://mirror.example.org/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mQINBFit2ioBEADhWpZ8
 -----END PGP PUBLIC KEY BLOCK-----
"""

POLICY_BOOKWORM = """\
mesa-vulkan-drivers:
  Installed: (none)
  Candidate: 22.3.6-1+deb12u2
  Version table:
     22.3.6-1+deb12u2 500
        500 https://mirror.example.org/debian bookworm/main amd64 Packages
"""
POLICY_BACKPORTS = """\
mesa-vulkan-drivers:
  Installed: 22.3.6-1+deb12u2
  Candidate: 22.3.6-1+deb12u2
  Version table:
     25.0.7-2~bpo12+1 100
        100 https://mirror.example.org/debian bookworm-backports/main amd64 Packages
 *** 22.3.6-1+deb12u2 500
        500 https://mirror.example.org/debian bookworm/main amd64 Packages
        100 /var/lib/dpkg/status
"""
POLICY_NOBLE = """\
mesa-vulkan-drivers:
  Installed: (none)
  Candidate: 25.2.8-0ubuntu0.24.04.1
  Version table:
     25.2.8-0ubuntu0.24.04.1 500
        500 http://archive.example.org/ubuntu noble-updates/main amd64 Packages
     24.0.5-1ubuntu1 500
        500 http://archive.example.org/ubuntu noble/main amd64 Packages
"""
POLICY_JAMMY = POLICY_NOBLE.replace("25.2.8-0ubuntu0.24.04.1", "23.2.1-1ubuntu3.1~22.04.3").replace("24.0.5", "22.0.1")

BOOKWORM = {"ID": "debian", "VERSION_ID": "12", "VERSION_CODENAME": "bookworm", "PRETTY_NAME": "Debian 12"}
JAMMY = {"ID": "ubuntu", "VERSION_ID": "22.04", "VERSION_CODENAME": "jammy", "PRETTY_NAME": "Ubuntu 22.04.5 LTS"}
NOBLE = {"ID": "ubuntu", "VERSION_ID": "24.04", "VERSION_CODENAME": "noble", "PRETTY_NAME": "Ubuntu 24.04 LTS"}


@pytest.mark.parametrize(
    ("text", "version"),
    [("25.0.7-2~bpo12+1", (25, 0, 7)), ("22.3.6-1+deb12u2", (22, 3, 6)), ("1:24.3-1", (24, 3)), ("26", (26,))],
)
def test_parse_version(text, version):
    assert system.parse_version(text) == version


def test_parse_version_names_what_it_got():
    with pytest.raises(ValueError, match="unknown"):
        system.parse_version("unknown")


def test_parse_os_release_unquotes():
    text = 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n# comment\nID=debian\nVERSION_ID="12"\nEMPTY=\n'
    assert system.parse_os_release(text) == {
        "PRETTY_NAME": "Debian GNU/Linux 12 (bookworm)",
        "ID": "debian",
        "VERSION_ID": "12",
        "EMPTY": "",
    }


def test_parse_deb822():
    main, security = system.parse_deb822(DEBIAN_12)
    assert main.types == ("deb",)
    assert main.uris == ("https://mirror.example.org/debian",)
    assert main.suites == ("bookworm", "bookworm-updates")
    assert main.options == {"Signed-By": "/usr/share/keyrings/debian-archive-keyring.gpg"}
    assert security.suites == ("bookworm-security",)


def test_parse_deb822_leaves_out_disabled_sources():
    (source,) = system.parse_deb822(UBUNTU_24)
    assert source.uris == ("http://archive.example.org/ubuntu",)
    assert source.types == ("deb", "deb-src")


def test_parse_sources_list():
    main, source_code, updates, third_party, security = system.parse_sources_list(DEBIAN_11)
    assert main == (("deb",), ("http://mirror.example.org/debian",), ("bullseye",), ("main", "contrib"), {})
    assert source_code.types == ("deb-src",)
    assert updates.suites == ("bullseye-updates",)
    assert third_party.options == {"Architectures": "amd64 arm64", "Signed-By": "/etc/apt/keyrings/x.gpg"}
    assert security.components == ("main",)


def test_machine_sources_reads_this_machine():
    assert all(source.uris for source in system.machine_sources())


def test_backports_come_from_the_mirror_of_the_main_suite():
    assert system.backports_stanza(system.parse_deb822(DEBIAN_12), "bookworm") == (
        "Types: deb\n"
        "URIs: https://mirror.example.org/debian\n"
        "Suites: bookworm-backports\n"
        "Components: main\n"
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
    )


def test_backports_do_not_come_from_a_third_party():
    # Third parties, too, call their suite by the codename and their component main.
    third_party_first = "deb https://tools.example.com/linux/debian bullseye main\n" + DEBIAN_11
    stanza = system.backports_stanza(system.parse_sources_list(third_party_first), "bullseye")
    assert "URIs: http://mirror.example.org/debian\n" in stanza
    assert "Signed-By" not in stanza


def test_backports_prefer_a_path_that_names_the_distribution():
    text = "deb https://tools.example.com bookworm main\ndeb https://mirror.example.org/debian bookworm main\n"
    assert "mirror.example.org/debian" in system.backports_stanza(system.parse_sources_list(text), "bookworm")


def test_backports_keep_an_embedded_key():
    stanza = system.backports_stanza(system.parse_deb822(EMBEDDED_KEY), "bookworm")
    (again,) = system.parse_deb822(stanza)
    assert again.suites == ("bookworm-backports",)
    assert again.options == system.parse_deb822(EMBEDDED_KEY)[0].options
    assert " mQINBFit2ioBEADhWpZ8\n" in stanza


def test_backports_need_a_main_suite():
    assert system.backports_stanza(system.parse_deb822(DEBIAN_12), "trixie") is None


@pytest.mark.parametrize(
    ("policy", "candidate", "versions", "suite"),
    [
        (POLICY_BOOKWORM, "22.3.6-1+deb12u2", [("22.3.6-1+deb12u2", "bookworm")], None),
        (
            POLICY_BACKPORTS,
            "22.3.6-1+deb12u2",
            [("25.0.7-2~bpo12+1", "bookworm-backports"), ("22.3.6-1+deb12u2", "bookworm")],
            "bookworm-backports",
        ),
        (
            POLICY_NOBLE,
            "25.2.8-0ubuntu0.24.04.1",
            [("25.2.8-0ubuntu0.24.04.1", "noble-updates"), ("24.0.5-1ubuntu1", "noble")],
            "",
        ),
        ("x:\n  Installed: (none)\n  Candidate: (none)\n  Version table:\n", None, [], None),
        ("", None, [], None),
    ],
)
def test_policy(policy, candidate, versions, suite):
    assert system.parse_policy(policy) == (candidate, versions)
    assert system.suite_of_new_mesa(policy) == suite


MESA = [system.MESA_PACKAGE, "libvulkan1"]


def test_plan_adds_the_backports_suite_to_debian_12():
    add, update, install = system.plan(BOOKWORM, POLICY_BOOKWORM, system.parse_deb822(DEBIAN_12), MESA)
    assert add.argv == ("tee", system.BACKPORTS_FILE)
    assert "Suites: bookworm-backports\n" in add.stdin
    assert update.argv == ("apt-get", "update")
    assert install.argv[-4:] == ("-t", "bookworm-backports", *MESA)


def test_plan_uses_a_backports_suite_that_is_there():
    (install,) = system.plan(BOOKWORM, POLICY_BACKPORTS, system.parse_deb822(DEBIAN_12), MESA)
    assert install.argv[-4:] == ("-t", "bookworm-backports", *MESA)


def test_plan_takes_the_default_where_it_is_new_enough():
    (install,) = system.plan(NOBLE, POLICY_NOBLE, system.parse_deb822(UBUNTU_24), MESA)
    assert install.argv == ("apt-get", "install", "-y", "--no-install-recommends", *MESA)


def test_plan_refuses_a_release_without_a_new_mesa():
    with pytest.raises(system.Unsupported, match=r"Ubuntu 22.04.5 LTS: apt offers Mesa 23.2.1.* 24.3 or newer"):
        system.plan(JAMMY, POLICY_JAMMY, [], MESA)


def test_plan_installs_libraries_on_any_release():
    (install,) = system.plan(JAMMY, POLICY_JAMMY, [], ["libgl1"])
    assert install.argv[-1] == "libgl1"


def test_plan_says_when_no_mirror_can_be_derived():
    with pytest.raises(system.Unsupported, match="Add bookworm-backports"):
        system.plan(BOOKWORM, POLICY_BOOKWORM, [], MESA)


def test_commands_for_an_administrator():
    steps = system.plan(BOOKWORM, POLICY_BOOKWORM, system.parse_deb822(DEBIAN_12), MESA)
    text = system.as_text(steps)
    assert text.startswith(f"sudo tee {system.BACKPORTS_FILE} <<'END'\nTypes: deb\n")
    assert text.endswith(
        "\nEND\nsudo apt-get update\n"
        "sudo apt-get install -y --no-install-recommends -t bookworm-backports mesa-vulkan-drivers libvulkan1"
    )


@pytest.fixture
def bookworm(monkeypatch, tmp_path):
    """A Debian 12 without backports; returns the list of the commands that were run."""
    commands = []

    def run(root, step, check=True):
        commands.append(" ".join([*root, *step.argv]))

    monkeypatch.setattr(system, "BACKPORTS_FILE", str(tmp_path / "backports.sources"))
    monkeypatch.setattr(system, "parse_os_release", lambda text: BOOKWORM)
    monkeypatch.setattr(system, "machine_sources", lambda: system.parse_deb822(DEBIAN_12))
    monkeypatch.setattr(system, "_output", lambda argv: POLICY_BOOKWORM)
    monkeypatch.setattr(system, "_run", run)
    monkeypatch.setattr(system.shutil, "which", lambda name: f"/usr/bin/{name}")
    return commands


def test_install_runs_the_plan(monkeypatch, bookworm):
    monkeypatch.setattr(system, "root_prefix", lambda: ["sudo"])
    system.install(MESA)
    assert [command.split()[1:3] for command in bookworm] == [
        ["apt-get", "update"],
        ["tee", system.BACKPORTS_FILE],
        ["apt-get", "update"],
        ["apt-get", "install"],
    ]


def test_install_without_root_asks_an_administrator_and_runs_nothing(monkeypatch, bookworm):
    monkeypatch.setattr(system, "root_prefix", lambda: None)
    with pytest.raises(system.Unsupported, match=r"ask an administrator(.|\n)*sudo apt-get install"):
        system.install(MESA)
    assert bookworm == []


def test_install_leaves_no_apt_source_behind_that_does_not_work(monkeypatch, bookworm):
    def fail(root, step, check=True):
        bookworm.append(step.argv)
        if "install" in step.argv:
            raise system.Unsupported("the mirror has no backports")

    monkeypatch.setattr(system, "root_prefix", list)
    monkeypatch.setattr(system, "_run", fail)
    with pytest.raises(system.Unsupported, match="no backports"):
        system.install(MESA)
    assert bookworm[-1] == ("rm", "-f", system.BACKPORTS_FILE)


def test_install_without_apt_says_what_is_needed(monkeypatch):
    monkeypatch.setattr(system.shutil, "which", lambda name: None)
    with pytest.raises(system.Unsupported, match="lavapipe"):
        system.install(MESA)


def test_icd_files_puts_those_of_the_environment_first(monkeypatch, tmp_path):
    (tmp_path / "lvp_icd.json").write_text("{}")
    monkeypatch.setenv("VK_DRIVER_FILES", "/somewhere/own_icd.json")
    monkeypatch.delenv("VK_ICD_FILENAMES", raising=False)
    assert system.icd_files([str(tmp_path)]) == ["/somewhere/own_icd.json", str(tmp_path / "lvp_icd.json")]


@pytest.mark.parametrize(
    ("nvidia", "icd", "mesa", "problem"),
    [
        (True, None, None, None),
        (False, None, None, "no Vulkan driver"),
        (False, "lvp_icd.json", (22, 3, 6), "Mesa 22.3.6 is too old"),
        (False, "lvp_icd.json", (24, 3), None),
        (False, "lvp_icd.json", None, None),
    ],
)
def test_vulkan_problem(monkeypatch, nvidia, icd, mesa, problem):
    monkeypatch.setattr(system, "has_nvidia_vulkan", lambda: nvidia)
    monkeypatch.setattr(system, "lavapipe_icd", lambda: icd)
    monkeypatch.setattr(system, "mesa_version", lambda: mesa)
    said = system.vulkan_problem()
    assert said is None if problem is None else problem in said
