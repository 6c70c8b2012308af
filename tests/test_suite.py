"""What the other tests rely on."""

import os

import xla_flags


def test_flags_that_xla_does_not_know_are_left_out():
    """A made-up one would end every worker of the suite."""
    devices = "--xla_force_host_platform_device_count=2"
    found = xla_flags.known(["--xla_of_tomorrow=true", devices, "--xla_of_yesterday=1"])
    assert found == [devices]


def test_flags_in_the_environment_stay_as_they_are(monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3 --xla_other=1")
    monkeypatch.setattr(xla_flags, "known", list)
    xla_flags.put_in_environment()
    flags = os.environ["XLA_FLAGS"].split()
    assert flags[:2] == ["--xla_force_host_platform_device_count=3", "--xla_other=1"]
    assert flags[2:] == list(xla_flags.WANTED[1:])
    four = xla_flags.with_devices(4).split()
    assert four == [*flags[1:], "--xla_force_host_platform_device_count=4"]
