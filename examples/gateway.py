"""A gateway to a language model: users log in with a JWT, whose claims limit what they may do.

zcproto serve gateway:app
python gateway.py [HOST:PORT]

It needs PyJWT: `pip install '.[oidc]'` in a clone. For the tokens of an OpenID provider no code is needed:
docs/identity-providers.md.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator

import jwt

import zcproto
from zcproto import App, CallableAuthenticator, Context, Identity

SECRET = "shared with the issuer of tokens, at least 32 bytes"  # of a file or a vault in a real gateway
AUDIENCE = "model-gateway"


def check_token(token: str) -> Identity | None:
    """Return the user of a valid token. The session ends with it."""
    try:
        claims = jwt.decode(token, SECRET, ["HS256"], audience=AUDIENCE, options={"require": ["exp", "sub"]})
    except jwt.InvalidTokenError:
        return None
    return Identity(claims["sub"], roles={*claims.get("roles", ())}, ends_at=claims["exp"] * 1000)


app = App(authenticators=[CallableAuthenticator("jwt", check_token)])


@app.method("ask", roles={"reader"})
async def ask(context: Context, prompt: str) -> AsyncIterator[str]:
    """Yield an answer word by word. A real gateway asks its model here."""
    for word in f"{context.user} asked: {prompt}".split():
        yield word


@app.method("models.train", roles={"trainer"})
def train() -> str:
    """Start a training."""
    return "started"


def issue_token(user: str) -> str:
    """Stand in for the issuer, which is another program."""
    claims = {"sub": user, "aud": AUDIENCE, "exp": int(time.time()) + 300, "roles": ["reader"]}
    return jwt.encode(claims, SECRET, "HS256")


async def main(address: str = "localhost:7443") -> None:
    async with zcproto.connect(address, login={"scheme": "jwt", "token": issue_token("ada")}) as client:
        print(*[word async for word in client.stream("ask", prompt="what is TLS?")])
        try:
            await client.call("models.train")
        except zcproto.PermissionDenied:
            print("training is for trainers")
    try:
        async with zcproto.connect(address, login={"scheme": "jwt", "token": "forged"}):
            pass
    except zcproto.Unauthenticated as error:
        print(error.message)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
