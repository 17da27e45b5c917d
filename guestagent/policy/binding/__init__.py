"""How a policy gets into force, what vouches for it, and what holds it while agents come and go."""

__all__ = ("KEY_PATH", "POLICY_PATH")

POLICY_PATH = "/etc/guestagent/policy.json"
#: One line: ``ed25519 HEX min_svn=N``.
KEY_PATH = "/etc/guestagent/policy.key"
