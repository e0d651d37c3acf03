"""zcproto: compact binary calls over TLS 1.3, for programs that talk over a hostile network."""
