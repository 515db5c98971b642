//! Decisions on disk.

mod disk;
mod format;

pub use format::FORMAT_VERSION;

use crate::{Decision, InvalidDecision, Key};
use disk::{MAX_BYTES, Stamp};
use format::Decisions;
use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Decisions that one file holds at most; the oldest go first.
const MAX_DECISIONS: usize = 2048;
/// Files whose contents are kept in memory at most: pairs of device and library in use at once.
const MAX_FILES_IN_MEMORY: usize = 4;
/// How long to wait for another process that is writing.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);

/// Decisions kept in JSON files under one directory, one file for each device and library.
///
/// * Writes are atomic (temporary file, then rename) and merge with what is there under an advisory lock,
///   so processes and threads that write at once do not lose each other's decisions.
/// * Readers need no lock. A decision once seen is answered from memory; a key not known costs one look at
///   the file's date, and the file is read again only when it has changed.
/// * A file holds at most 2048 decisions and 16 MiB, the newest; the contents of at most four files are kept
///   in memory.
///
/// A launch layer asks once a kernel and shape class, and keeps the answer.
#[derive(Debug)]
pub struct Store {
    directory: PathBuf,
    shipped: Decisions,
    lock_timeout: Duration,
    max_decisions: usize,
    /// Most recently used last.
    memory: Mutex<VecDeque<Snapshot>>,
}

/// What one file held when it was read.
#[derive(Debug)]
struct Snapshot {
    path: PathBuf,
    stamp: Option<Stamp>,
    decisions: Decisions,
}

/// Where a decision came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The user's file.
    User,
    /// The shipped defaults.
    Shipped,
}

/// A decision that [`Store::get`] found.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// The decision.
    pub decision: Arc<Decision>,
    /// Where it came from.
    pub source: Source,
}

/// What [`Store::put`] did besides saving.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saved {
    /// The file written.
    pub path: PathBuf,
    /// Where an unreadable file was moved to, if there was one.
    pub moved_aside: Option<PathBuf>,
    /// Old decisions dropped because the file was full.
    pub dropped: usize,
}

/// What can go wrong with stored decisions. None of it need stop a launch: the default parameters remain.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system refused.
    #[error("cannot {action} {}: {error}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's error.
        error: io::Error,
    },
    /// The file is damaged. [`Store::put`] moves it aside; [`Store::get`] leaves it.
    #[error("{} is damaged: {why}; the next decision saved moves it aside", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The file is of another format version. It is never touched.
    #[error(
        "{} has format version {found}, this program reads {FORMAT_VERSION}: use another directory",
        path.display()
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u64,
    },
    /// Another process held the lock for too long.
    #[error("{} has been locked by another process for {waited:?}", path.display())]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// How long was waited.
        waited: Duration,
    },
    /// So many damaged files lie beside this one that no more are kept.
    #[error("{count} damaged copies lie beside {}: remove them", path.display())]
    TooManyDamaged {
        /// The file that would have been moved aside.
        path: PathBuf,
        /// Copies found.
        count: u32,
    },
    /// The decision to save contradicts itself.
    #[error("cannot save the decision: {0}")]
    Decision(InvalidDecision),
    /// The decision to save is longer than a whole file may be.
    #[error("cannot save the decision: its evidence takes {bytes} bytes, a file {MAX_BYTES} at most")]
    TooLong {
        /// Its length as JSON.
        bytes: u64,
    },
    /// The shipped defaults cannot be read.
    #[error("shipped defaults: {0}")]
    Defaults(String),
}

impl Store {
    /// A store under `directory`. Touches nothing yet: the directory is made by the first [`Store::put`],
    /// and one that is missing holds no decisions.
    pub fn open(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
            shipped: Decisions::default(),
            lock_timeout: LOCK_TIMEOUT,
            max_decisions: MAX_DECISIONS,
            memory: Mutex::default(),
        }
    }

    /// Adds decisions shipped with the program, asked after the user's file. `json` has the format of the
    /// store's files, but may hold any devices and libraries; a user's file can be shipped as it is.
    ///
    /// # Errors
    /// [`StoreError::Defaults`] for text that is no such JSON.
    pub fn with_defaults(mut self, json: &str) -> Result<Self, StoreError> {
        self.shipped =
            format::parse(json.as_bytes()).map_err(|fault| StoreError::Defaults(fault.to_string()))?;
        Ok(self)
    }

    /// Sets how long [`Store::put`] waits for another writer (10 s unless set).
    #[must_use]
    pub fn with_lock_timeout(mut self, timeout: Duration) -> Self {
        self.lock_timeout = timeout;
        self
    }

    /// Sets how many decisions a file holds at most (2048 unless set, at least 1).
    #[must_use]
    pub fn with_max_decisions(mut self, count: usize) -> Self {
        self.max_decisions = count.max(1);
        self
    }

    /// The file that holds decisions for a key's device and library.
    pub fn path(&self, key: &Key) -> PathBuf {
        self.directory.join(disk::file_name(key))
    }

    /// The decision for `key`: from the user's file, else from the shipped defaults, else `None`.
    ///
    /// # Errors
    /// A file that exists but cannot be read, is damaged, or has another format version. The caller may then
    /// go on with [`Store::shipped`] or without a decision.
    pub fn get(&self, key: &Key) -> Result<Option<Found>, StoreError> {
        let path = self.path(key);
        let mut memory = self.memory();
        let known = take(&mut memory, &path);
        let snapshot = match known {
            Some(snapshot) if snapshot.decisions.contains_key(key) => snapshot,
            known => refresh(known, path, key)?,
        };
        let found = snapshot.decisions.get(key).cloned();
        remember(&mut memory, snapshot);
        drop(memory);
        let user = found.map(|decision| Found { decision, source: Source::User });
        Ok(user.or_else(|| self.shipped(key)))
    }

    /// The shipped decision for `key`, if any.
    pub fn shipped(&self, key: &Key) -> Option<Found> {
        let decision = Arc::clone(self.shipped.get(key)?);
        Some(Found { decision, source: Source::Shipped })
    }

    /// All decisions in the user's file for a key's device and library, in the order of their keys.
    ///
    /// # Errors
    /// As [`Store::get`].
    pub fn list(&self, key: &Key) -> Result<Vec<Arc<Decision>>, StoreError> {
        let path = self.path(key);
        let decisions = disk::read(&path)?.map(|(bytes, _)| parse_file(&path, key, &bytes)).transpose()?;
        Ok(decisions.unwrap_or_default().into_values().collect())
    }

    /// Saves `decision` under its key, in place of an older one. Decisions that other processes have saved
    /// meanwhile stay. A damaged file is moved aside as `NAME.corrupt-N`, never deleted.
    ///
    /// # Errors
    /// A decision that contradicts itself or is too long; a directory that cannot be written; a lock held for
    /// too long; a file of another format version; too many damaged files.
    pub fn put(&self, decision: &Decision) -> Result<Saved, StoreError> {
        decision.validate().map_err(StoreError::Decision)?;
        let key = &decision.key;
        let path = self.path(key);
        let _lock = disk::lock(&self.directory, &path, self.lock_timeout)?;
        let (mut decisions, moved_aside) = match disk::read(&path)? {
            None => (Decisions::default(), None),
            Some((bytes, _)) => match parse_file(&path, key, &bytes) {
                Ok(decisions) => (decisions, None),
                Err(StoreError::Corrupt { .. }) => (Decisions::default(), Some(disk::move_aside(&path)?)),
                Err(other) => return Err(other),
            },
        };
        decisions.insert(key.clone(), Arc::new(decision.clone()));
        let (text, dropped) = print_within_limits(&mut decisions, key, self.max_decisions, &path)?;
        disk::write(&path, &text)?;
        let stamp = disk::stamp(&path)?;
        let mut memory = self.memory();
        take(&mut memory, &path);
        remember(&mut memory, Snapshot { path: path.clone(), stamp, decisions });
        Ok(Saved { path, moved_aside, dropped })
    }

    /// A panic elsewhere cannot leave the memory half-changed: snapshots are replaced whole.
    fn memory(&self) -> MutexGuard<'_, VecDeque<Snapshot>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes the snapshot of `path` out of the memory.
fn take(memory: &mut VecDeque<Snapshot>, path: &Path) -> Option<Snapshot> {
    let at = memory.iter().position(|snapshot| snapshot.path == path)?;
    memory.remove(at)
}

/// Puts a snapshot in as the most recent, and drops the least recent beyond the limit.
fn remember(memory: &mut VecDeque<Snapshot>, snapshot: Snapshot) {
    memory.push_back(snapshot);
    while memory.len() > MAX_FILES_IN_MEMORY {
        memory.pop_front();
    }
}

/// The snapshot as it is, if the file has not changed since; else the file read anew.
fn refresh(known: Option<Snapshot>, path: PathBuf, key: &Key) -> Result<Snapshot, StoreError> {
    let stamp = disk::stamp(&path)?;
    if let Some(snapshot) = known.filter(|snapshot| snapshot.stamp == stamp) {
        return Ok(snapshot);
    }
    match disk::read(&path)? {
        None => Ok(Snapshot { path, stamp: None, decisions: Decisions::default() }),
        Some((bytes, stamp)) => {
            let decisions = parse_file(&path, key, &bytes)?;
            Ok(Snapshot { path, stamp: Some(stamp), decisions })
        }
    }
}

/// Parses a user's file, which must hold only the device and library of `key`.
fn parse_file(path: &Path, key: &Key, bytes: &[u8]) -> Result<Decisions, StoreError> {
    let corrupt = |why: String| StoreError::Corrupt { path: path.into(), why };
    let decisions = format::parse(bytes).map_err(|fault| match fault {
        format::Fault::Version(found) => StoreError::Version { path: path.into(), found },
        other => corrupt(other.to_string()),
    })?;
    match decisions.keys().find(|other| (&other.device, &other.library) != (&key.device, &key.library)) {
        Some(other) => Err(corrupt(format!("it holds a decision for another device or library: {other}"))),
        None => Ok(decisions),
    }
}

/// The file's text, after dropping the oldest decisions until count and length are allowed; and how many
/// were dropped.
fn print_within_limits(
    decisions: &mut Decisions,
    newest: &Key,
    limit: usize,
    path: &Path,
) -> Result<(Vec<u8>, usize), StoreError> {
    let mut dropped = drop_oldest(decisions, newest, limit);
    loop {
        let text = format::print(decisions).map_err(|error| StoreError::Io {
            action: "print",
            path: path.into(),
            error: error.into(),
        })?;
        match decisions.len() {
            _ if text.len() as u64 <= MAX_BYTES => return Ok((text, dropped)),
            0 | 1 => return Err(StoreError::TooLong { bytes: text.len() as u64 }),
            // By eighths: each step prints all anew.
            len => dropped += drop_oldest(decisions, newest, len - len.div_ceil(8)),
        }
    }
}

/// Drops the oldest decisions beyond `limit`, but never the one just made (clocks can go back).
fn drop_oldest(decisions: &mut Decisions, newest: &Key, limit: usize) -> usize {
    let excess = decisions.len().saturating_sub(limit);
    if excess > 0 {
        let mut others: Vec<(u64, Key)> = decisions.iter().map(|(key, d)| (d.when, key.clone())).collect();
        others.retain(|(_, key)| key != newest);
        others.sort();
        for (_, key) in others.iter().take(excess) {
            decisions.remove(key);
        }
    }
    excess
}
