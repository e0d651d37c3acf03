//! Key files: refused if other users can access them, created with mode 0600.

use crate::error::{Error, Result};
use crate::text;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use zeroize::Zeroizing;

const MAX_KEY_FILE: u32 = 65_536;
/// The permissions of others than the owner.
const OTHERS: u32 = 0o077;

/// Read a file that only this user can access. Checks the opened file, not the path.
pub(crate) fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>> {
    // Opening a FIFO would wait for its writer.
    let is_file = std::fs::metadata(path).map(|found| found.is_file());
    if is_file.is_ok_and(|is_file| !is_file) {
        return Err(unusable(path, "is not a regular file; check the path"));
    }
    let cannot = |error: std::io::Error| unusable(path, &format!("cannot be read: {}; check the path", error.kind()));
    let file = File::open(path).map_err(cannot)?;
    let found = file.metadata().map_err(cannot)?;
    if !found.is_file() {
        return Err(unusable(path, "is not a regular file; check the path"));
    }
    check_access(path, &found)?;
    if found.len() > u64::from(MAX_KEY_FILE) {
        return Err(unusable(path, "is too large for a key; check the path"));
    }
    let mut content = Zeroizing::new(Vec::with_capacity(MAX_KEY_FILE as usize)); // never moved while it grows
    file.take(u64::from(MAX_KEY_FILE)).read_to_end(&mut content).map_err(cannot)?;
    Ok(content)
}

#[cfg(unix)]
fn check_access(path: &Path, found: &std::fs::Metadata) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    if found.mode() & OTHERS == 0 {
        return Ok(());
    }
    let mode = found.mode() & 0o7777;
    let fault = format!(
        "is accessible by other users (mode {mode:04o}); run chmod 600 on it, or create a new key if another user may have \
         read it"
    );
    Err(unusable(path, &fault))
}

#[cfg(not(unix))]
fn check_access(_path: &Path, _found: &std::fs::Metadata) -> Result<()> {
    Ok(())
}

/// Write a new file of mode 0600 and flush it to disk.
pub(crate) fn write_new(path: &Path, content: &[u8]) -> Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    private(&mut options);
    let mut file = options.open(path).map_err(|error| match error.kind() {
        ErrorKind::AlreadyExists => unusable(path, "already exists; load it, or use another path"),
        kind => unusable(path, &format!("cannot be written: {kind}; check the path")),
    })?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(|error| {
        let _ = std::fs::remove_file(path); // it was created above
        unusable(path, &format!("cannot be written: {}", error.kind()))
    })
}

/// Let only this user access a file that is created.
pub(crate) fn private(options: &mut OpenOptions) {
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(options, 0o600);
    #[cfg(not(unix))]
    let _ = options;
}

pub(crate) fn unusable(path: &Path, what: &str) -> Error {
    Error::Certificate(format!("{}: {what}", text::path(path)))
}
