//! The README's program is an example, and does what it says.
#![allow(clippy::unwrap_used)]

use std::process::Command;

#[test]
fn the_program_in_the_readme_works() {
    let code = include_str!("../../README.md").split("```rust\n").nth(1).unwrap().split("```").next().unwrap();
    assert_eq!(code, include_str!("../../examples/quick_start.rs"));
    // This test is in `target/…/deps`, the examples are beside that.
    let program = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().join("examples/quick_start");
    assert!(program.exists(), "{} is built by `cargo build --examples --all-features`", program.display());
    let folder = tempfile::tempdir().unwrap();
    let printed = |program: &std::path::Path| {
        let output = Command::new(program).current_dir(folder.path()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let first = "creating a user for ann@example.org\nsending an e-mail to ann@example.org\nactivating user 7\n";
    assert_eq!(printed(&program), format!("{first}registered user 7\n"));
    // It has ended, and only its output is read.
    let again = printed(&program);
    assert_eq!(again.lines().collect::<Vec<_>>()[1..], ["registered user 7"], "{again}");
}
