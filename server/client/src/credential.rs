//! Who asks: a bearer token, or a browser's session.
//!
//! Owns: the secret, and that nothing prints it. Must not know: how requests are sent.

use std::fmt;
use std::path::Path;

use hyper::header::{AUTHORIZATION, COOKIE, HeaderName, HeaderValue};

use crate::error::SetupError;
use crate::trust::private;

/// Most bytes of a token or a cookie.
const SECRET_MAX: usize = 4096;

/// What a client shows with every request. Over a Unix socket a caller needs none: it is the local user.
#[derive(Clone)]
pub struct Credential {
    header: HeaderName,
    /// Marked as sensitive: hyper does not print it either.
    value: HeaderValue,
    /// Where the secret begins in it.
    secret_at: usize,
}

impl Credential {
    /// A bearer token.
    ///
    /// # Errors
    /// It is empty, too long, or has other characters than visible ASCII. The error does not have it.
    pub fn bearer(token: &str) -> Result<Self, SetupError> {
        Self::new(AUTHORIZATION, "Bearer ", token, SetupError::Token)
    }

    /// The bearer token that a file holds, as the daemon writes `admin.token`. White space around it does not
    /// count.
    ///
    /// # Errors
    /// The file cannot be read, others than its owner have access to it, or it holds no token.
    pub fn bearer_file(path: &Path) -> Result<Self, SetupError> {
        private(path)?;
        let file = |source| SetupError::File { path: path.to_owned(), source };
        let text = std::fs::read_to_string(path).map_err(|e| file(e.into()))?;
        Self::bearer(text.trim()).map_err(|e| file(e.into()))
    }

    /// The cookie of a session, as `NAME=VALUE`. Changes are sent with the header that keeps pages of other
    /// origins from sending them.
    ///
    /// # Errors
    /// It has not that form. The error does not have it.
    pub fn session(cookie: &str) -> Result<Self, SetupError> {
        match cookie.split_once('=') {
            Some((name, value)) if !name.is_empty() && !value.contains([';', ',', '"']) => {
                Self::new(COOKIE, &format!("{name}="), value, SetupError::Cookie)
            }
            _ => Err(SetupError::Cookie),
        }
    }

    fn new(header: HeaderName, before: &str, secret: &str, wrong: SetupError) -> Result<Self, SetupError> {
        let visible = |text: &str| text.bytes().all(|b| b.is_ascii_graphic());
        if secret.is_empty() || secret.len() > SECRET_MAX || !visible(secret) || !visible(before.trim_end()) {
            return Err(wrong);
        }
        let Ok(mut value) = HeaderValue::from_str(&format!("{before}{secret}")) else { return Err(wrong) };
        value.set_sensitive(true);
        Ok(Self { header, value, secret_at: before.len() })
    }

    pub(crate) fn header(&self) -> (&HeaderName, &HeaderValue) {
        (&self.header, &self.value)
    }

    /// Whether it is a session's, which a browser would send without being asked.
    pub(crate) fn is_session(&self) -> bool {
        self.header == COOKIE
    }

    /// The secret alone.
    pub(crate) fn secret(&self) -> &[u8] {
        &self.value.as_bytes()[self.secret_at..]
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_session() { "Credential(session)" } else { "Credential(bearer)" })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_credential_does_not_show_its_secret() {
        let (token, cookie) =
            (Credential::bearer("s3cret").unwrap(), Credential::session("m-s=s3cret").unwrap());
        for credential in [token, cookie] {
            let shown = format!("{credential:?}{:?}", credential.header());
            assert!(!shown.contains("s3cret"), "{shown}");
            assert_eq!(credential.secret(), b"s3cret");
        }
    }

    #[test]
    fn what_is_no_credential_is_refused_and_not_shown() {
        for wrong in ["", "a b", "s3cret\r\nx: y", "s3cr\u{e9}t", &"s3cret".repeat(1000)] {
            let error = Credential::bearer(wrong).unwrap_err();
            assert!(!format!("{error:?}{error}").contains("s3cr"), "{error:?}");
        }
        for wrong in ["s3cret", "=s3cret", "a=", "a=s3cret; b=c", "a b=s3cret"] {
            let error = Credential::session(wrong).unwrap_err();
            assert!(!format!("{error:?}{error}").contains("s3cr"), "{error:?}");
        }
    }

    #[test]
    fn a_token_file_is_its_owners_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, "s3cret\n").unwrap();
        let mode = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        mode(0o640);
        assert!(matches!(Credential::bearer_file(&path), Err(SetupError::TooOpen { mode: 0o640, .. })));
        mode(0o600);
        assert_eq!(Credential::bearer_file(&path).unwrap().secret(), b"s3cret");
        std::fs::write(&path, " \n").unwrap();
        assert!(matches!(Credential::bearer_file(&path), Err(SetupError::File { .. })));
        assert!(matches!(Credential::bearer_file(&dir.path().join("none")), Err(SetupError::File { .. })));
    }
}
