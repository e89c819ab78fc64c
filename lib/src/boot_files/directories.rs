//! Directories that the administrator listed, and files beneath them.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RenameFlags, ResolveFlags, fstat, fstatfs, openat, openat2,
    renameat_with, unlinkat,
};
use rustix::io::Errno;

/// A look-up that raced with a rename is repeated this often.
const TRIES: usize = 32;
/// Longest name that is looked up, in bytes.
const PATH_MAX: usize = 4095;
/// File systems that show the kernel and processes, not files: `proc`, `sysfs`, `cgroup`, `cgroup2`,
/// `debugfs`, `securityfs`, `devpts`.
const NO_FILES: [u64; 7] = [0x9fa0, 0x6265_6572, 0x0027_e0eb, 0x6367_7270, 0x6462_6720, 0x7363_6673, 0x1cd1];

/// Why a listed directory cannot be used. Read by the administrator, in the daemon's log.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// It is relative to wherever the daemon was started.
    #[error("image_directories or volume_directories has {path}, which is not an absolute path")]
    Relative {
        /// As listed.
        path: PathBuf,
    },
    /// It cannot be opened.
    #[error("image_directories or volume_directories has {path}, which cannot be opened as a directory")]
    Open {
        /// As listed.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Secrets of the daemon lie in it, or it lies among them.
    #[error(
        "image_directories or volume_directories has {path}, and {kept}, which the daemon keeps for itself, is the same, in it or around it; \
         move the images into a directory of their own"
    )]
    Kept {
        /// As listed.
        path: PathBuf,
        /// What the daemon keeps.
        kept: PathBuf,
    },
    /// A view of the kernel.
    #[error(
        "image_directories or volume_directories has {path}, which is on a file system of the kernel's and holds no images"
    )]
    Pseudo {
        /// As listed.
        path: PathBuf,
    },
}

/// Why a file is not opened. `Display` is for whoever named it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FileRefusal {
    /// Nobody listed a directory.
    #[error(
        "this host has no directory of images; its administrator lists one in image_directories of the configuration \
         file (or with --image-directory)"
    )]
    NoDirectory,
    /// Nobody listed a directory of volumes.
    #[error(
        "this host has no directory of volumes; its administrator lists one in volume_directories of the configuration file \
         (or with --volume-directory)"
    )]
    NoVolumeDirectory,
    /// It is not beneath a directory of volumes, or a link on the way leads out of it.
    #[error(
        "not beneath a directory of volumes of this host, by a path that stays beneath it; put the file into one, or let the \
         administrator list its directory in volume_directories"
    )]
    NoVolume,
    /// The daemon may not write it.
    #[error("the daemon cannot write the file")]
    Unwritable,
    /// It is not beneath a listed directory, or a link on the way leads out of it.
    #[error(
        "not beneath a directory of images of this host, by a path that stays beneath it; put the file into one, or let \
         the administrator list its directory in image_directories"
    )]
    Outside,
    /// No absolute path.
    #[error("not the absolute path of a file in a directory of images of this host")]
    Malformed,
    /// Nothing has this name.
    #[error("there is no such file in the directories of images")]
    Missing,
    /// A directory, a pipe, a device, a socket.
    #[error("not a regular file")]
    NotAFile,
    /// The daemon may not read it, or the disk cannot.
    #[error("the daemon cannot read the file")]
    Unreadable,
    /// There is nothing in it.
    #[error("the file is empty")]
    Empty,
    /// More than the guest can take.
    #[error(
        "the file has {bytes} bytes, and {limit} at most fit into the guest's memory; give it more memory"
    )]
    TooLarge {
        /// Bytes.
        bytes: u64,
        /// How many there may be.
        limit: u64,
    },
}

impl FileRefusal {
    /// Stable code.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::NoDirectory => "no_image_directory",
            Self::NoVolumeDirectory => "no_volume_directory",
            Self::NoVolume => "outside_volume_directories",
            Self::Unwritable => "unwritable",
            Self::Outside => "outside_image_directories",
            Self::Malformed | Self::Missing | Self::NotAFile => "not_a_file",
            Self::Unreadable => "unreadable",
            Self::Empty => "empty_file",
            Self::TooLarge { .. } => "too_large",
        }
    }
}

/// A directory that was listed.
#[derive(Debug)]
struct Directory {
    /// As listed: names are compared with it.
    path: PathBuf,
    /// What it was when the daemon began: what takes its name later does not take its place.
    fd: OwnedFd,
    /// Whether its files are guests' to write.
    volumes: bool,
}

/// The directories that files of guests may come from.
#[derive(Debug, Default)]
pub struct ImageDirectories {
    list: Vec<Directory>,
}

/// A regular file beneath a listed directory, open.
#[derive(Debug)]
pub struct ImageFile {
    pub(super) file: File,
    pub(super) bytes: u64,
}

impl ImageFile {
    /// Bytes that it had when it was opened.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The file, open for reading.
    pub fn into_fd(self) -> OwnedFd {
        self.file.into()
    }
}

/// A regular file beneath a directory of volumes, as open descriptions of its own.
#[derive(Debug)]
pub struct VolumeFile {
    /// For reading and writing.
    pub write: OwnedFd,
    /// For reading.
    pub read: OwnedFd,
    /// Bytes that it had when it was opened.
    pub bytes: u64,
}

impl ImageDirectories {
    /// Opens the listed directories: `paths`, whose files are read, and `volumes`, whose files are guests' to
    /// write as well. `kept` is what the daemon keeps for itself: nothing of it may be reached
    /// through them.
    ///
    /// # Errors
    /// [`DirectoryError`] names the first that cannot be used.
    pub fn open(paths: &[PathBuf], kept: &[PathBuf]) -> Result<Self, DirectoryError> {
        Self::with_volumes(paths, &[], kept)
    }

    /// The same, with `volumes`, whose files are guests' to write as well.
    ///
    /// # Errors
    /// As [`ImageDirectories::open`].
    pub fn with_volumes(
        paths: &[PathBuf],
        volumes: &[PathBuf],
        kept: &[PathBuf],
    ) -> Result<Self, DirectoryError> {
        let volumes = volumes.iter().map(|path| Directory::open(path, true, kept));
        let images = paths.iter().map(|path| Directory::open(path, false, kept));
        Ok(Self { list: volumes.chain(images).collect::<Result<_, _>>()? })
    }

    /// Opens a regular file of a directory of volumes for reading and writing, by its absolute path.
    ///
    /// # Errors
    /// [`FileRefusal`].
    pub fn volume(&self, path: &Path) -> Result<VolumeFile, FileRefusal> {
        self.in_volumes(path, |directory, rest| {
            let place = directory.place(rest)?;
            regular(&place)?;
            let open = |flags, failed| {
                let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
                let again = format!("/proc/self/fd/{}", place.as_raw_fd());
                rustix::fs::open(again, flags, Mode::empty()).map_err(|_| failed)
            };
            let write = open(OFlags::RDWR, FileRefusal::Unwritable)?;
            let read = open(OFlags::RDONLY, FileRefusal::Unreadable)?;
            let bytes = fstat(&read).ok().and_then(|s| u64::try_from(s.st_size).ok()).unwrap_or(0);
            Ok(VolumeFile { write, read, bytes })
        })
    }

    /// Makes a file among the volumes that holds what `template` does, unless there is one of the name.
    /// It has its content when it gets the name.
    ///
    /// # Errors
    /// [`FileRefusal`].
    pub fn make_volume(&self, path: &Path, template: &ImageFile) -> Result<(), FileRefusal> {
        self.in_volumes(path, |directory, rest| {
            let (parent, name) = (rest.parent().unwrap_or(Path::new("")), rest.file_name());
            let name = name.ok_or(FileRefusal::NotAFile)?;
            let parent = if parent.as_os_str().is_empty() { None } else { Some(directory.place(parent)?) };
            let parent = parent.as_ref().unwrap_or(&directory.fd);
            let failed = |error: io::Error| {
                tracing::warn!(%error, "a file of a guest cannot be made");
                FileRefusal::Unwritable
            };
            // Of two that make it at once one is late: the name that counts is given once.
            let made = format!(".{}.{}.new", name.to_string_lossy(), uuid::Uuid::now_v7());
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let fd = openat(parent, made.as_str(), flags, Mode::RUSR | Mode::WUSR);
            let mut file = File::from(fd.map_err(|e| failed(e.into()))?);
            let whole = copied(&template.file, &mut file).and_then(|()| file.sync_all());
            let named = whole.and_then(|()| {
                match renameat_with(parent, made.as_str(), parent, name, RenameFlags::NOREPLACE) {
                    Err(Errno::EXIST) => {
                        unlinkat(parent, made.as_str(), AtFlags::empty()).map_err(Into::into)
                    }
                    other => other.map_err(Into::into),
                }
            });
            named.map_err(|error: io::Error| {
                let _ = unlinkat(parent, made.as_str(), AtFlags::empty());
                failed(error)
            })
        })
    }

    fn in_volumes<T>(
        &self,
        path: &Path,
        open: impl Fn(&Directory, &Path) -> Result<T, FileRefusal>,
    ) -> Result<T, FileRefusal> {
        if !self.list.iter().any(|d| d.volumes) {
            return Err(FileRefusal::NoVolumeDirectory);
        }
        check_path(path)?;
        let mut refusal = FileRefusal::NoVolume;
        for directory in self.list.iter().filter(|d| d.volumes) {
            let Ok(rest) = path.strip_prefix(&directory.path) else { continue };
            if rest.as_os_str().is_empty() {
                return Err(FileRefusal::NotAFile);
            }
            match open(directory, rest) {
                Ok(done) => return Ok(done),
                Err(FileRefusal::Outside) => refusal = FileRefusal::NoVolume,
                Err(other) => refusal = other,
            }
        }
        Err(refusal)
    }

    /// Opens a regular file by its absolute path. What is not beneath a listed directory is not looked at, so
    /// that nobody learns whether it is there.
    ///
    /// # Errors
    /// [`FileRefusal`].
    pub fn file(&self, path: &Path) -> Result<ImageFile, FileRefusal> {
        if self.list.is_empty() {
            return Err(FileRefusal::NoDirectory);
        }
        check_path(path)?;
        let mut refusal = FileRefusal::Outside;
        for directory in &self.list {
            let Ok(rest) = path.strip_prefix(&directory.path) else { continue };
            if rest.as_os_str().is_empty() {
                return Err(FileRefusal::NotAFile);
            }
            match directory.file(rest) {
                Ok(file) => return Ok(file),
                // A directory inside another may be listed, too.
                Err(e) => refusal = e,
            }
        }
        Err(refusal)
    }
}

/// Writes what a file holds from its beginning into another.
fn copied(mut from: &File, to: &mut File) -> io::Result<()> {
    let mut chunk = vec![0; 64 << 10];
    loop {
        match from.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(count) => to.write_all(chunk.get(..count).unwrap_or_default())?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Whether a path could lead to a file beneath a directory.
fn check_path(path: &Path) -> Result<(), FileRefusal> {
    let plain = |c: Component<'_>| matches!(c, Component::RootDir | Component::Normal(_));
    let bytes = path.as_os_str().as_encoded_bytes();
    if !path.is_absolute() || bytes.len() > PATH_MAX || bytes.contains(&0) {
        return Err(FileRefusal::Malformed);
    }
    // Links with `..` in them are the kernel's to follow; a name has no need of it.
    if !path.components().all(plain) {
        return Err(FileRefusal::Outside);
    }
    Ok(())
}

/// Whether a place is a regular file; gives its bytes.
fn regular(place: &OwnedFd) -> Result<u64, FileRefusal> {
    let found = fstat(place).map_err(|_| FileRefusal::Unreadable)?;
    if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
        return Err(FileRefusal::NotAFile);
    }
    Ok(u64::try_from(found.st_size).unwrap_or(0))
}

impl Directory {
    fn open(path: &Path, volumes: bool, kept: &[PathBuf]) -> Result<Self, DirectoryError> {
        let path = path.to_owned();
        if !path.is_absolute() || path.components().any(|c| c == Component::ParentDir) {
            return Err(DirectoryError::Relative { path });
        }
        let failed = |source: io::Error| DirectoryError::Open { path: path.clone(), source };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(&path, flags, Mode::empty()).map_err(|e| failed(e.into()))?;
        let kind = fstatfs(&fd).map_err(|e| failed(e.into()))?.f_type;
        if NO_FILES.contains(&u64::from(kind as u32)) {
            return Err(DirectoryError::Pseudo { path });
        }
        let place = std::fs::canonicalize(&path).map_err(failed)?;
        let this = fstat(&fd).map_err(|e| failed(e.into()))?;
        for kept in kept {
            // What is not there has nothing to hide, and its directory is made private when it is made.
            let Ok(kept) = std::fs::canonicalize(kept) else { continue };
            // By number and not by name: a bind mount has another name for the same directory.
            let around = kept.ancestors().any(|dir| {
                rustix::fs::stat(dir).is_ok_and(|s| (s.st_dev, s.st_ino) == (this.st_dev, this.st_ino))
            });
            if around || place.starts_with(&kept) {
                return Err(DirectoryError::Kept { path, kept });
            }
        }
        Ok(Self { path, fd, volumes })
    }

    /// Opens `rest`, which is relative. First as a place without content, so that not even opening has an
    /// effect on what is no file (a tape that rewinds, a pipe that waits for its other end); then that very
    /// place, whatever its name means by now.
    fn file(&self, rest: &Path) -> Result<ImageFile, FileRefusal> {
        let place = self.place(rest)?;
        let bytes = regular(&place)?;
        if bytes == 0 {
            return Err(FileRefusal::Empty);
        }
        // Not waiting is for a lease that somebody holds on it.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let again = format!("/proc/self/fd/{}", place.as_raw_fd());
        let fd = rustix::fs::open(again, flags, Mode::empty()).map_err(|_| FileRefusal::Unreadable)?;
        Ok(ImageFile { file: File::from(fd), bytes })
    }

    /// Symbolic links are followed as long as they stay beneath the directory (`current -> v2`); a link of
    /// `/proc`, another mount and anything that leads out are not.
    fn place(&self, rest: &Path) -> Result<OwnedFd, FileRefusal> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        for _ in 0..TRIES {
            match openat2(&self.fd, rest, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve) {
                Ok(place) => return Ok(place),
                // The tree changed while the kernel made sure that the path stays in it.
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(Errno::XDEV | Errno::LOOP) => return Err(FileRefusal::Outside),
                Err(Errno::NOENT | Errno::NOTDIR | Errno::NAMETOOLONG) => return Err(FileRefusal::Missing),
                Err(Errno::INVAL) => return Err(FileRefusal::Malformed),
                Err(error) => {
                    tracing::warn!(%error, "a file in a directory of images cannot be opened");
                    return Err(FileRefusal::Unreadable);
                }
            }
        }
        Err(FileRefusal::Unreadable)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;
    use std::sync::atomic::{AtomicBool, Ordering};

    use rustix::fs::{CWD, mkfifoat, mknodat};

    use super::*;

    struct Tree {
        _dir: tempfile::TempDir,
        images: PathBuf,
        outside: PathBuf,
        listed: ImageDirectories,
    }

    fn tree() -> Tree {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let (images, outside) = (root.join("images"), root.join("outside"));
        std::fs::create_dir_all(images.join("deep/er")).unwrap();
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(images.join("vmlinuz"), "kernel").unwrap();
        std::fs::write(images.join("deep/er/initrd"), "disk").unwrap();
        std::fs::write(outside.join("secret"), "secret").unwrap();
        let listed = ImageDirectories::open(std::slice::from_ref(&images), &[]).unwrap();
        Tree { _dir: dir, images, outside, listed }
    }

    impl Tree {
        fn text(&self, path: impl AsRef<Path>) -> Result<String, FileRefusal> {
            let mut file = self.listed.file(path.as_ref())?.file;
            let mut text = String::new();
            file.read_to_string(&mut text).unwrap();
            Ok(text)
        }
    }

    #[test]
    fn files_beneath_a_listed_directory_are_opened() {
        let t = tree();
        assert_eq!(t.text(t.images.join("vmlinuz")).unwrap(), "kernel");
        assert_eq!(t.text(t.images.join("deep/./er//initrd")).unwrap(), "disk");
        symlink("deep/er", t.images.join("current")).unwrap();
        assert_eq!(t.text(t.images.join("current/initrd")).unwrap(), "disk", "a link that stays inside");
        symlink("../vmlinuz", t.images.join("deep/up")).unwrap();
        assert_eq!(t.text(t.images.join("deep/up")).unwrap(), "kernel", "up, and still inside");
    }

    #[test]
    fn no_path_leads_out_of_a_listed_directory() {
        let t = tree();
        let secret = t.outside.join("secret");
        let link = |name: &str, to: &Path| symlink(to, t.images.join(name)).unwrap();
        link("absolute", &secret);
        link("relative", Path::new("../outside/secret"));
        link("directory", &t.outside);
        link("root", Path::new("/"));
        link("magic", Path::new("/proc/self/root"));
        link("fd", Path::new("/dev/fd/0"));
        link("chain", Path::new("relative"));
        link("loop", Path::new("loop"));
        // Absolute links are outside even where they come back: what `/` is depends on who follows them.
        link("home", &t.images.join("vmlinuz"));
        let below = secret.strip_prefix("/").unwrap();
        let outside = [
            secret.clone(),
            "/etc/shadow".into(),
            "/proc/self/environ".into(),
            "/dev/fd/0".into(),
            "/dev/stdin".into(),
            t.images.join("../outside/secret"),
            t.images.join("deep/../../outside/secret"),
            t.images.with_file_name("images-too").join("x"),
            t.images.join("absolute"),
            t.images.join("relative"),
            t.images.join("directory/secret"),
            t.images.join("root").join(below),
            t.images.join("magic").join(below),
            t.images.join("fd"),
            t.images.join("chain"),
            t.images.join("loop"),
            t.images.join("home"),
            t.images.join("..").join("outside/secret"),
        ];
        for path in outside {
            assert_eq!(t.text(&path).unwrap_err(), FileRefusal::Outside, "{}", path.display());
        }
    }

    #[test]
    fn what_is_no_path_of_a_file_is_refused_without_being_looked_up() {
        let t = tree();
        let long = format!("{}/{}", t.images.display(), "x/".repeat(3000));
        for path in ["", "vmlinuz", "./vmlinuz", &format!("{}/a\0b", t.images.display()), &long] {
            assert_eq!(t.text(path).unwrap_err(), FileRefusal::Malformed, "{path:?}");
        }
        assert_eq!(t.text(t.images.join("none")).unwrap_err(), FileRefusal::Missing);
        assert_eq!(t.text(t.images.join("vmlinuz/x")).unwrap_err(), FileRefusal::Missing);
        assert_eq!(t.text(t.images.join("y".repeat(300))).unwrap_err(), FileRefusal::Missing);
        std::fs::write(t.images.join("empty"), "").unwrap();
        assert_eq!(t.text(t.images.join("empty")).unwrap_err(), FileRefusal::Empty);
    }

    #[test]
    fn only_regular_files_are_opened_and_nothing_else_is_touched() {
        let t = tree();
        let at = |name: &str| t.images.join(name);
        mkfifoat(CWD, at("pipe"), Mode::RWXU).unwrap();
        let _listener = UnixListener::bind(at("socket")).unwrap();
        let mut odd = vec![at("pipe"), at("socket"), at("deep"), t.images.clone()];
        // Null and zero, where this user may make them.
        for (name, minor) in [("null", 3), ("zero", 5)] {
            let made =
                mknodat(CWD, at(name), FileType::CharacterDevice, Mode::RWXU, rustix::fs::makedev(1, minor));
            odd.extend(made.is_ok().then(|| at(name)));
        }
        symlink("pipe", at("to-pipe")).unwrap();
        odd.push(at("to-pipe"));
        for path in odd {
            assert_eq!(t.text(&path).unwrap_err(), FileRefusal::NotAFile, "{}", path.display());
        }
    }

    #[test]
    fn a_name_that_is_exchanged_all_the_time_never_shows_a_file_from_outside() {
        let t = tree();
        let (good, bad, name) = (t.images.join("good"), t.images.join("bad"), t.images.join("name"));
        std::fs::create_dir(&good).unwrap();
        std::fs::write(good.join("secret"), "fine").unwrap();
        symlink(&good, &name).unwrap();
        symlink("../outside", &bad).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                let (inside, outside) = (t.images.join("to-good"), t.images.join("to-bad"));
                while !stop.load(Ordering::Relaxed) {
                    let _ = symlink("good", &inside);
                    let _ = std::fs::rename(&inside, &name);
                    let _ = symlink("../outside", &outside);
                    let _ = std::fs::rename(&outside, &name);
                }
            });
            let mut read = 0;
            for _ in 0..20_000 {
                match t.text(name.join("secret")) {
                    Ok(text) => {
                        assert_eq!(text, "fine");
                        read += 1;
                    }
                    Err(FileRefusal::Outside | FileRefusal::Missing | FileRefusal::Unreadable) => {}
                    Err(other) => panic!("{other}"),
                }
            }
            stop.store(true, Ordering::Relaxed);
            println!("{read} of 20000 looks met the file that is inside");
        });
    }

    #[test]
    fn without_a_listed_directory_every_file_is_refused() {
        let listed = ImageDirectories::open(&[], &[]).unwrap();
        let error = listed.file(Path::new("/etc/hostname")).unwrap_err();
        assert_eq!((error, error.code()), (FileRefusal::NoDirectory, "no_image_directory"));
        assert!(error.to_string().contains("image_directories"), "{error}");
    }

    #[test]
    fn a_listed_directory_is_not_around_nor_in_what_the_daemon_keeps() {
        let t = tree();
        let root = t.images.parent().unwrap().to_owned();
        let state = root.join("images/deep");
        let list = |path: &Path| ImageDirectories::open(&[path.to_owned()], std::slice::from_ref(&state));
        for bad in [&state, &t.images, &root, Path::new("/"), &state.join("er")] {
            let error = list(bad).unwrap_err();
            assert!(matches!(error, DirectoryError::Kept { .. }), "{}: {error}", bad.display());
        }
        symlink(&state, root.join("alias")).unwrap();
        assert!(matches!(list(&root.join("alias")), Err(DirectoryError::Kept { .. })));
        assert!(list(&t.outside).is_ok());
        assert!(list(Path::new("images")).is_err_and(|e| matches!(e, DirectoryError::Relative { .. })));
        let up = t.outside.join("../images");
        assert!(list(&up).is_err_and(|e| matches!(e, DirectoryError::Relative { .. })));
        assert!(list(&root.join("none")).is_err_and(|e| matches!(e, DirectoryError::Open { .. })));
        let file = t.outside.join("secret");
        assert!(list(&file).is_err_and(|e| matches!(e, DirectoryError::Open { .. })));
        for pseudo in ["/proc", "/proc/self", "/sys"].map(Path::new).into_iter().filter(|p| p.exists()) {
            assert!(list(pseudo).is_err_and(|e| matches!(e, DirectoryError::Pseudo { .. })), "{pseudo:?}");
        }
    }

    #[test]
    fn what_takes_the_place_of_a_listed_directory_later_is_not_read() {
        let t = tree();
        std::fs::rename(&t.images, t.images.with_file_name("away")).unwrap();
        symlink(&t.outside, &t.images).unwrap();
        assert_eq!(t.text(t.images.join("secret")).unwrap_err(), FileRefusal::Missing);
        assert_eq!(t.text(t.images.join("vmlinuz")).unwrap(), "kernel");
    }
}
