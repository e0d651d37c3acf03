"""Run `zcproto serve` with the application of real_server_test.go: serve.py HOME PORT [USER].

If a user is given, it is added first, and its key is the first line of output.
"""

import sys

from zcproto.cli import main

home, port, *users = sys.argv[1:]
for user in users:
    main(["--home", home, "user", "add", user])
sys.exit(main(["--home", home, "serve", "--port", port, "everything:app"]))
