//! One daemon as a client knows it.
//!
//! Owns: endpoint, credential, TLS and limits together, checked. Must not know: requests.

use std::fmt;
use std::path::PathBuf;

use hyper::header::HeaderValue;
use rustls::pki_types::ServerName;
use tokio_rustls::TlsConnector;

use crate::credential::Credential;
use crate::endpoint::{Endpoint, EndpointError};
use crate::error::SetupError;
use crate::limits::Limits;
use crate::trust::{self, Identity, Trust};

/// What every request of a client goes by.
pub(crate) struct Settings {
    pub(crate) endpoint: Endpoint,
    pub(crate) host: HeaderValue,
    pub(crate) credential: Option<Credential>,
    /// Of a TLS endpoint.
    pub(crate) tls: Option<(TlsConnector, ServerName<'static>)>,
    pub(crate) limits: Limits,
}

impl Settings {
    pub(crate) fn new(
        endpoint: Endpoint,
        credential: Option<Credential>,
        trust: Option<&Trust>,
        identity: Option<&Identity>,
        limits: Limits,
    ) -> Result<Self, SetupError> {
        endpoint.check()?;
        let tls = match &endpoint {
            Endpoint::Unix(_) | Endpoint::Tcp(_) if trust.is_none() && identity.is_none() => None,
            Endpoint::Unix(_) | Endpoint::Tcp(_) => return Err(SetupError::TrustInTheClear(endpoint)),
            Endpoint::Tls { host, .. } => {
                let config = trust::config(trust.ok_or(SetupError::NoTrust)?, identity)?;
                let name =
                    ServerName::try_from(host.clone()).map_err(|_| EndpointError::Host(host.clone()))?;
                Some((TlsConnector::from(std::sync::Arc::new(config)), name))
            }
        };
        let host = HeaderValue::try_from(endpoint.host_header())
            .map_err(|_| EndpointError::Host(endpoint.to_string()))?;
        Ok(Self { endpoint, host, credential, tls, limits })
    }

    /// A Unix socket and the usual limits: nothing to check.
    pub(crate) fn local(socket: PathBuf) -> Self {
        Self {
            endpoint: Endpoint::Unix(socket),
            host: HeaderValue::from_static("localhost"),
            credential: None,
            tls: None,
            limits: Limits::default(),
        }
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("endpoint", &self.endpoint)
            .field("credential", &self.credential)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}
