//! The programs of the README are those of `examples/`, and run against a real `zcproto serve`.
#![cfg(unix)]

mod support;

use std::path::Path;
use std::process::Command;
use support::{Server, root};

/// Return the program of a name in a Markdown text.
fn program(text: &str, name: &str) -> String {
    let start = text.find(&format!("`{name}`:\n\n```")).unwrap_or_else(|| panic!("{name} is missing"));
    let code = &text[start..];
    let code = &code[code.find("```").unwrap()..];
    let code = &code[code.find('\n').unwrap() + 1..];
    code[..code.find("```").unwrap()].to_owned()
}

fn run(server: &Server, name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = std::fs::read_to_string(folder.join("README.md")).unwrap();
    let source = std::fs::read_to_string(folder.join(format!("examples/{name}.rs"))).unwrap();
    assert_eq!(program(&readme, &format!("{name}.rs")), source);
    // Cargo builds the examples beside the tests.
    let target = std::env::current_exe().unwrap();
    let example = target.parent().unwrap().parent().unwrap().join("examples").join(name);
    assert!(example.exists(), "run `cargo build --examples`, which `cargo test` does without --test");
    let mut command = Command::new(example);
    command.arg(server.address()).current_dir(&server.home).env("ZCPROTO_HOME", &server.home);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Start a server with an application of a guide.
fn serve(guide: &str, app: &str) -> Server {
    let text = std::fs::read_to_string(root().join(format!("docs/{guide}.md"))).unwrap();
    let mut server = Server::new("");
    server.write(&format!("{app}.py"), &program(&text, &format!("{app}.py")));
    let key = server.add_user("ada");
    server.write("ada.key", &key);
    server.start(Some(&format!("{app}:app")));
    server
}

#[test]
fn ask_prints_the_answer() {
    let mut server = Server::new("");
    let key = server.add_user("ada");
    server.write("ada.key", &key);
    server.start(None);
    assert_eq!(run(&server, "ask"), "hello\n");
}

#[test]
fn listen_prints_items_and_the_result() {
    assert_eq!(run(&serve("streams", "talk"), "listen"), "to\nbe\nor\nnot\n{\"words\": 4}\n");
}

#[test]
fn desk_answers_calls_from_the_server() {
    let refused = "PERMISSION_DENIED: not approved; ask the person at the client";
    assert_eq!(run(&serve("calls", "agent"), "desk"), format!("ran ls\n{refused}\n"));
}

#[test]
fn enter_logs_in_by_a_scheme_of_the_application() {
    assert_eq!(run(&serve("authentication", "accounts"), "enter"), "ada\n");
}
