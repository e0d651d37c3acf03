"""A gRPC server and a client, both with BoringSSL: grpc_call.py CERTIFICATE KEY NAME CA.

The client trusts only the CA, verifies the name and writes the answer to its call. Exits with 3 if the call fails.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["GRPC_VERBOSITY"] = "NONE"  # errors are in the exception

import grpc

certificate, key, name, ca = sys.argv[1:]
server = grpc.server(ThreadPoolExecutor(1))
handler = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Echo", {"Echo": handler})])
pair = (Path(key).read_bytes(), Path(certificate).read_bytes())
port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
server.start()
channel = grpc.secure_channel(
    f"127.0.0.1:{port}",
    grpc.ssl_channel_credentials(Path(ca).read_bytes()),
    [("grpc.ssl_target_name_override", name)],
)
try:
    sys.stdout.buffer.write(channel.unary_unary("/test.Echo/Echo")(b"accepted"))
except grpc.RpcError as error:
    print(error, file=sys.stderr)
    sys.exit(3)
finally:
    channel.close()
    server.stop(None)
