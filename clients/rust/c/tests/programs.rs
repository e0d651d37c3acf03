//! Runs C and Python programs with the library, against a `zcproto serve` of this repository: under the sanitizers for
//! addresses and undefined behaviour, and under valgrind. Checks that the header is the one that cbindgen writes.

extern crate zcproto_client as zcproto;

#[path = "../../tests/support/fake.rs"]
#[allow(dead_code, reason = "the tests of the crate use all of it")]
mod fake;
#[path = "../../tests/support/mod.rs"]
mod support;

use fake::Fake;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use support::Server;
use zcproto::codec;
use zcproto::frame::Kind;

const WARNINGS: [&str; 7] = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror"];
/// What the standard library of Rust needs from the system.
const SYSTEM: [&str; 4] = ["-lgcc_s", "-lpthread", "-lm", "-ldl"];

fn package() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Run a command and return its output. `None` if the program is not installed.
fn try_run(command: &mut Command) -> Option<String> {
    let output = match command.output() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("SKIPPED: {} is not installed", command.get_program().to_string_lossy());
            return None;
        }
        output => output.unwrap(),
    };
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}\n{out}\n{err}");
    Some(out.into_owned())
}

fn run(command: &mut Command) -> String {
    try_run(command).expect("the program is installed")
}

/// Build the library and return the folder of it.
fn library() -> PathBuf {
    run(Command::new(env!("CARGO")).args(["build", "--quiet", "--package", "zcproto-c"]).current_dir(package()));
    let program = std::env::current_exe().unwrap(); // target/debug/deps/programs-...
    program.ancestors().nth(2).unwrap().to_owned()
}

/// Compile a C program with the static library.
fn compile(source: &str, program: &Path, flags: &[&str]) {
    let library = library().join("libzcproto.a");
    let mut command = Command::new("cc");
    command.args(WARNINGS).args(["-D_POSIX_C_SOURCE=200809L", "-g", "-O1"]).args(flags);
    command.arg("-I").arg(package().join("include")).arg("-o").arg(program).arg(package().join(source));
    run(command.arg(library).args(SYSTEM));
}

/// A server with the methods of methods.py and the users ada and bob.
fn server() -> (Server, String, String) {
    let mut server = Server::new("");
    let (ada, bob) = (server.add_user("ada"), server.add_user("bob"));
    server.write("methods.py", include_str!("methods.py"));
    server.start(Some("methods:app"));
    (server, ada, bob)
}

/// Run the program all.c with a server.
fn run_all(server: &Server, ada: &str, bob: &str, home: &str, command: &mut Command) {
    let home = server.home.join(home);
    std::fs::create_dir(&home).unwrap();
    let paired = server.run(&["pair", "--user", "ada"]);
    let is_code = |word: &&str| word.len() == 9 && word.as_bytes()[4] == b'-';
    let code = paired.split_whitespace().find(is_code).expect("pair prints a code");
    let command = command.arg(server.address()).arg(server.ca_file()).args([ada, bob, code]).arg(home);
    if let Some(output) = try_run(command) {
        assert_eq!(output, "all\n");
    }
}

#[test]
fn the_header_is_the_one_that_cbindgen_writes() {
    let written = std::env::temp_dir().join(format!("zcproto-{}.h", std::process::id()));
    let mut command = Command::new("cbindgen");
    command.args(["--quiet", "--config", "cbindgen.toml", "--output"]).arg(&written).arg(".").current_dir(package());
    if try_run(&mut command).is_some() {
        let (now, kept) = (std::fs::read_to_string(&written), include_str!("../include/zcproto.h"));
        std::fs::remove_file(&written).unwrap();
        assert!(now.unwrap() == kept, "write include/zcproto.h by cbindgen again; cbindgen.toml says how");
    }
}

#[test]
fn the_library_is_installed_for_linking_by_pkg_config() {
    let (server, ada, _) = server();
    let prefix = server.home.join("prefix");
    let target = library().parent().unwrap().to_owned();
    let mut make = Command::new("make");
    make.args(["--silent", "-C"]).arg(package()).args(["install", "PROFILE=dev"]);
    make.arg(format!("CARGO={} --quiet", env!("CARGO")));
    make.arg(format!("PREFIX={}", prefix.display())).arg(format!("CARGO_TARGET_DIR={}", target.display()));
    let mut flags = Command::new("pkg-config");
    flags.args(["--cflags", "--libs", "zcproto"]).env("PKG_CONFIG_PATH", prefix.join("lib/pkgconfig"));
    if try_run(&mut make).is_none() {
        return;
    }
    let Some(flags) = try_run(&mut flags) else { return };
    let program = server.home.join("linked");
    let mut compiler = Command::new("cc");
    compiler.args(WARNINGS).arg("-D_POSIX_C_SOURCE=200809L").arg(package().join("examples/ask.c"));
    run(compiler.arg("-o").arg(&program).args(flags.split_whitespace()).arg("-lpthread"));
    let needed = run(Command::new("readelf").arg("-d").arg(&program));
    assert!(needed.contains("[libzcproto.so.0.1]"), "{needed}");
    let mut linked = Command::new(&program);
    linked.env("LD_LIBRARY_PATH", prefix.join("lib")).arg(server.address()).arg(server.ca_file()).args(["ada", &ada]);
    assert_eq!(run(&mut linked), "{\"word\":\"hello\"}\n".repeat(2));
}

#[test]
fn the_shared_library_exports_the_functions_of_the_header_alone() {
    let header = include_str!("../include/zcproto.h");
    let declared = header.split(|c: char| !c.is_ascii_alphanumeric() && !"_(".contains(c));
    let declared: BTreeSet<&str> = declared
        .filter_map(|word| word.trim_start_matches('(').split_once('(').map(|(name, _)| name))
        .filter(|name| name.starts_with("zcp_"))
        .collect();
    let mut symbols = Command::new("nm");
    symbols.args(["--dynamic", "--defined-only", "--format=just-symbols"]).arg(library().join("libzcproto.so"));
    let symbols = run(&mut symbols);
    assert_eq!(symbols.lines().collect::<BTreeSet<_>>(), declared);
}

#[test]
fn the_header_compiles_as_cpp() {
    let source = std::env::temp_dir().join(format!("zcproto-{}.cpp", std::process::id()));
    std::fs::write(&source, "#include \"zcproto.h\"\nint main() { return zcp_version() == nullptr; }\n").unwrap();
    let mut compiler = Command::new("c++");
    compiler.args(["-std=c++11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", "-I"]);
    try_run(compiler.arg(package().join("include")).arg(&source));
    std::fs::remove_file(&source).unwrap();
}

#[test]
fn every_function_works_under_sanitizers_and_valgrind() {
    let (server, ada, bob) = server();
    let sanitized = server.home.join("sanitized");
    compile("tests/all.c", &sanitized, &["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]);
    run_all(&server, &ada, &bob, "client-1", Command::new(sanitized).env("ASAN_OPTIONS", "detect_leaks=1"));
    let plain = server.home.join("plain");
    compile("tests/all.c", &plain, &[]);
    // Without the tracking of undefined bits, which loses them in the assembly of ring.
    let mut valgrind = Command::new("valgrind");
    valgrind.args([
        "--quiet",
        "--undef-value-errors=no",
        "--error-exitcode=9",
        "--leak-check=full",
        "--errors-for-leak-kinds=definite,indirect,possible",
    ]);
    run_all(&server, &ada, &bob, "client-2", valgrind.arg(plain));
}

#[test]
fn sessions_are_closed_concurrently() {
    const SESSIONS: u32 = 8;
    let (server, home) = (Fake::new(), Server::new(""));
    let address = server.address();
    let script = std::thread::spawn(move || {
        let mut peer = server.accept();
        peer.send(&[fake::welcome_of(100)]);
        let mut closing = Vec::new();
        let mut next_token = 1;
        while closing.len() < SESSIONS as usize {
            let (kind, stream, body) = peer.receive().expect("a request");
            assert_eq!(kind, Kind::Request, "one request waits for the answer to another");
            if fake::method_of(&body) == "session.open" {
                peer.send(&[fake::session(stream, next_token)]);
                next_token += 1;
            } else {
                assert_eq!(fake::method_of(&body), "session.close");
                closing.push((Kind::Response, stream, codec::encode(&codec::Value::Nil).unwrap()));
            }
        }
        peer.send(&closing);
        peer.close();
    });
    let program = home.home.join("close");
    compile("tests/close.c", &program, &["-fsanitize=address,undefined", "-Wno-unused"]); // of support.h
    let mut command = Command::new(&program);
    assert_eq!(run(command.arg(address).arg(&home.home).arg(SESSIONS.to_string())), "closed\n");
    script.join().unwrap();
}

#[test]
fn the_examples_and_the_program_of_the_readme_run() {
    let (server, ada, _) = server();
    let readme = include_str!("../README.md");
    let source = readme.split("```c\n").nth(1).and_then(|rest| rest.split("```").next()).expect("a program in C");
    let source = server.write("hello.c", &source.replace("localhost:7443", &server.address()));
    let program = server.home.join("hello");
    compile(source.to_str().unwrap(), &program, &["-fsanitize=address,undefined"]);
    let mut hello = Command::new(&program);
    assert_eq!(run(hello.env("CA_FILE", server.ca_file()).env("ADA_KEY", &ada)), "{\"word\":\"hello\"}\n");
    let program = server.home.join("ask");
    compile("examples/ask.c", &program, &["-fsanitize=address,undefined"]);
    let hello = "{\"word\":\"hello\"}\n";
    let output = run(Command::new(&program).arg(server.address()).arg(server.ca_file()).args(["ada", &ada]));
    assert_eq!(output, hello.repeat(2));
    let mut python = Command::new("python3");
    python.arg(package().join("examples/ask.py")).arg(library().join("libzcproto.so")).arg(server.address());
    assert_eq!(run(python.arg(server.ca_file()).args(["ada", &ada])), hello);
}
