"""What must hold between settings: of one section, of two, or between sites.

Rules: combinations that cannot work are refused. Where a setting has no effect beside another, it is refused
if someone could believe to be protected by it, and else let be.

Must not know: what a single key accepts, where a value came from, anything on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from zcproto.config.rules import Refusal
from zcproto.config.tables import Tables


@dataclass(frozen=True)
class Check:
    """What must hold between settings. The fault is told of the first; the second is what it is measured by.

    `cure` is what to do, where it does not follow from that.
    """

    keys: tuple[str, ...]
    holds: Callable[..., bool]
    demand: str
    cure: str = ""

    def within(self, section: str) -> Check:
        """The same between the keys of these names in a section."""
        return replace(self, keys=tuple(f"{section}.{key}" for key in self.keys))


SITE_CHECKS = (
    Check(
        ("key", "certificate"),
        lambda keys, certificates: not keys or not certificates or len(keys) == len(certificates),
        "must be empty, if the files of certificates hold the keys too, or have as many paths as",
    ),
    Check(
        ("key_passphrase_file", "key_passphrase_variable"),
        lambda file, variable: file is None or variable is None,
        "must be empty, as the passphrase comes from one place, with",
    ),
)
"""What must hold between the keys of a site, and between those of the same names in [certificates]."""


def check_sites(sites: Tables) -> Iterator[Refusal]:
    """The faults between the keys of a site, and the names that two sites have."""
    owners: dict[str, int] = {}
    for index, site in sites.items():
        for check in SITE_CHECKS:
            if not check.holds(*(site[key] for key in check.keys)):
                subject, measure = check.keys[:2]
                yield Refusal(f"[{index}].{subject}", site[subject], f"{check.demand} {measure}")
        for place, name in enumerate(site["names"]):
            owner = owners.setdefault(name, index)
            if owner != index:
                yield Refusal(
                    f"[{index}].names[{place}]",
                    name,
                    f"is a name of certificates.site[{owner}] too; a name is served by one site",
                )


PRELOAD_MAX_AGE = 31_536_000
"""What the preload lists of browsers demand of max-age at least, in seconds."""

CHECKS = (
    Check(
        ("limits.max_frame_bytes_before_session", "limits.max_frame_bytes"),
        lambda before, after: before <= after,
        "must be at most",
    ),
    Check(
        ("certificates.renew_before", "certificates.lifetime"),
        lambda renew_before, lifetime: renew_before < lifetime,
        "must be less than",
    ),
    Check(
        ("sessions.lifetime", "sessions.refresh_lifetime", "sessions.refresh"),
        lambda lifetime, refresh_lifetime, refresh: lifetime <= refresh_lifetime or not refresh,
        "must, while sessions.refresh is true, be at most",
    ),
    *(check.within("certificates") for check in SITE_CHECKS),
    Check(
        ("certificates.certificate", "certificates.mode"),
        lambda certificate, mode: certificate or mode == "own",
        "must not be empty with",
        "name the files of the certificates that are served",
    ),
    *(
        Check(
            (f"certificates.{key}", "certificates.mode"),
            lambda value, mode: not value or mode == "files",
            "must be empty with",
            cure,
        )
        for key, cure in (
            (
                "certificate",
                'set mode = "files" to serve it, or give it names of its own in [[certificates.site]]',
            ),
            ("key", 'set mode = "files" to serve with it'),
            ("key_passphrase_file", "the server's own keys are not encrypted"),
            ("key_passphrase_variable", "the server's own keys are not encrypted"),
        )
    ),
    *(
        Check(
            (f"alerts.{key}", "alerts.webhook"),
            lambda value, webhook: value is None or webhook != "",
            "must be empty with",
            "name the webhook that it is for",
        )
        for key in ("webhook_secret_file", "webhook_ca_file")
    ),
    Check(
        ("alerts.webhook_ca_file", "alerts.webhook"),
        lambda ca_file, webhook: ca_file is None or webhook == "" or webhook.startswith("https:"),
        "must be empty with",
        "there is no certificate by http://",
    ),
    *(
        Check(
            (f"tls.{key}", "tls.client_auth"),
            lambda value, client_auth: not value or client_auth != "off",
            "must be empty with",
            'set client_auth = "optional" or "required", or no client is checked by it',
        )
        for key in ("client_ca_file", "client_crl_file", "client_pins")
    ),
    Check(
        ("http.hsts_preload", "http.hsts"),
        lambda preload, hsts: hsts or not preload,
        "must be false with",
        "set hsts = true to be in the lists of browsers",
    ),
    Check(
        ("http.hsts_preload", "http.hsts_include_subdomains"),
        lambda preload, include_subdomains: include_subdomains or not preload,
        "must be false with",
        "the lists of browsers take no name without the names below it",
    ),
    Check(
        ("http.hsts_preload", "http.hsts_max_age_seconds"),
        lambda preload, max_age: max_age >= PRELOAD_MAX_AGE or not preload,
        "must be false with",
        f"the lists of browsers demand {PRELOAD_MAX_AGE} seconds",
    ),
    Check(
        ("http.redirect_port", "http.enabled"),
        lambda port, enabled: enabled or not port,
        "must be 0 with",
        "there would be nothing to send people on to",
    ),
    Check(
        ("http.redirect_port", "server.port"),
        lambda port, tls_port: not port or port != tls_port,
        "must not be",
    ),
)
