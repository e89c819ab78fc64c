//! Whom a client takes for the daemon over TLS, and what it shows.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

mod common;

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mirrorvm_client::{
    Awaited, Client, ClientError, Credential, Endpoint, Identity, Limits, Request, SetupError, Trust,
    blocking,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection, StreamOwned};

use common::{SHORT, Server, answer, hang_up, on_tcp, patient, request};

/// An authority and what it issued, as files.
struct Issuer {
    dir: tempfile::TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Issuer {
    fn new() -> Self {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("ca.pem"), issuer.pem()).unwrap();
        Self { dir, issuer }
    }

    fn ca(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// Certificate and key of a name.
    fn issue(&self, name: &str) -> (PathBuf, PathBuf) {
        let key = KeyPair::generate().unwrap();
        let certificate =
            CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &self.issuer).unwrap();
        let at = |end: &str| self.dir.path().join(format!("{name}.{end}"));
        std::fs::write(at("pem"), certificate.pem()).unwrap();
        std::fs::write(at("key"), key.serialize_pem()).unwrap();
        std::fs::set_permissions(at("key"), std::fs::Permissions::from_mode(0o600)).unwrap();
        (at("pem"), at("key"))
    }
}

/// A server with the certificate of `name`, which tells whether it was shown one and which token.
fn serving(issuer: &Issuer, name: &str) -> (Server, String) {
    let (certificate, key) = issuer.issue(name);
    let chain = vec![CertificateDer::from_pem_file(&certificate).unwrap()];
    let pin = ring::digest::digest(&ring::digest::SHA256, &chain[0]);
    let pin: String = pin.as_ref().iter().map(|b| format!("{b:02x}")).collect();
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(issuer.ca()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier.allow_unauthenticated().build().unwrap())
        .with_single_cert(chain, PrivateKeyDer::from_pem_file(&key).unwrap())
        .unwrap();
    let config = Arc::new(config);
    let server = on_tcp(move |stream| {
        let session = ServerConnection::new(Arc::clone(&config)).unwrap();
        let mut stream = StreamOwned::new(session, stream);
        let asked = request(&mut stream)?;
        let shown = if stream.conn.peer_certificates().is_some() { "a certificate" } else { "nothing" };
        let token = asked.lines().find_map(|l| l.strip_prefix("authorization: ")).unwrap_or("no token");
        stream.write_all(answer("200 OK", "", &format!("{shown}, {token}")).as_bytes())?;
        stream.conn.send_close_notify();
        stream.flush()
    });
    (server, pin)
}

fn port(server: &Server) -> u16 {
    match server.endpoint {
        Endpoint::Tcp(address) => address.port(),
        Endpoint::Unix(_) | Endpoint::Tls { .. } => panic!("not on TCP"),
    }
}

fn at(server: &Server, host: &str) -> mirrorvm_client::Builder {
    Client::builder(Endpoint::Tls { host: host.into(), port: port(server) }).limits(patient())
}

fn ask(builder: mirrorvm_client::Builder) -> Result<String, ClientError> {
    let client = blocking::Client::new(builder.build().unwrap()).unwrap();
    let answer = client.send(&Request::get("/v1/whoami"))?;
    Ok(String::from_utf8(answer.into_body().to_vec()).unwrap())
}

fn is_refused(builder: mirrorvm_client::Builder) -> String {
    let error = ask(builder).unwrap_err();
    assert!(matches!(error, ClientError::Tls { .. }) && error.is_without_effect(), "{error:?}");
    format!("{error}: {}", std::error::Error::source(&error).unwrap())
}

#[test]
fn a_daemon_is_whom_its_authority_or_its_pin_says() {
    let (own, foreign) = (Issuer::new(), Issuer::new());
    let (server, pin) = serving(&own, "localhost");
    let trust = |issuer: &Issuer| Trust::authorities(&issuer.ca()).unwrap();
    assert_eq!(ask(at(&server, "localhost").trust(trust(&own))).unwrap(), "nothing, no token");
    is_refused(at(&server, "localhost").trust(trust(&foreign)));
    // The certificate is the name's, and this address is not in it.
    is_refused(at(&server, "127.0.0.1").trust(trust(&own)));
    // A pin is of the certificate, whatever its name.
    for host in ["localhost", "127.0.0.1"] {
        assert!(ask(at(&server, host).trust(Trust::pin(&pin).unwrap())).is_ok());
    }
    let wrong = is_refused(at(&server, "localhost").trust(Trust::pin(&"00".repeat(32)).unwrap()));
    assert!(wrong.contains(&format!("its certificate is sha256:{pin}")), "{wrong}");
    // Both are asked for: both must hold.
    let both =
        |issuer: &Issuer, pin: &str| at(&server, "localhost").trust(trust(issuer).and_pin(pin).unwrap());
    assert!(ask(both(&own, &pin)).is_ok());
    is_refused(both(&own, &"00".repeat(32)));
    is_refused(both(&foreign, &pin));
}

#[test]
fn a_client_shows_its_certificate_and_its_token() {
    let issuer = Issuer::new();
    let (server, pin) = serving(&issuer, "localhost");
    let (certificate, key) = issuer.issue("ops.example");
    let identity = Identity::from_files(&certificate, &key).unwrap();
    let shown = format!("{identity:?}");
    let secret = std::fs::read_to_string(&key).unwrap();
    let middle = secret.lines().nth(1).unwrap();
    assert!(!shown.contains(middle) && !shown.contains("PRIVATE"), "{shown}");
    let builder = at(&server, "localhost").trust(Trust::pin(&pin).unwrap()).identity(identity);
    assert_eq!(ask(builder.clone()).unwrap(), "a certificate, no token");
    let builder = builder.credential(Credential::bearer("t0ken").unwrap());
    assert_eq!(ask(builder).unwrap(), "a certificate, Bearer t0ken");
}

#[test]
fn a_server_in_the_clear_or_a_silent_one_is_no_daemon_over_tls() {
    let plain = on_tcp(|mut stream| stream.write_all(answer("400 Bad", "", "no TLS").as_bytes()));
    is_refused(at(&plain, "localhost").trust(Trust::pin(&"00".repeat(32)).unwrap()));
    let silent = on_tcp(|mut stream| hang_up(&mut stream));
    let builder = at(&silent, "127.0.0.1").trust(Trust::pin(&"00".repeat(32)).unwrap());
    let error = ask(builder.limits(Limits { connect: SHORT, ..patient() })).unwrap_err();
    assert!(matches!(error, ClientError::Late { awaited: Awaited::Connection, .. }), "{error:?}");
    assert!(error.is_without_effect());
}

#[test]
fn settings_that_do_not_go_together_are_refused() {
    let issuer = Issuer::new();
    let trust = Trust::authorities(&issuer.ca()).unwrap();
    let tls = Endpoint::Tls { host: "localhost".into(), port: 1 };
    assert!(matches!(Client::new(tls), Err(SetupError::NoTrust)));
    let unix = Endpoint::Unix("/run/x".into());
    let built = Client::builder(unix).trust(trust).build();
    assert!(matches!(built, Err(SetupError::TrustInTheClear(_))));
    let far = Endpoint::Tcp("192.0.2.7:80".parse().unwrap());
    assert!(matches!(Client::new(far), Err(SetupError::Endpoint(_))));
}

#[test]
fn files_without_certificates_or_open_to_others_are_refused_and_named() {
    let issuer = Issuer::new();
    let (certificate, key) = issuer.issue("ops.example");
    let named = |error: &SetupError, path: &Path| error.to_string().contains(&path.display().to_string());
    for path in [Path::new("/nowhere/ca.pem"), &key] {
        let error = Trust::authorities(path).unwrap_err();
        assert!(matches!(error, SetupError::File { .. }) && named(&error, path), "{error:?}");
    }
    let error = Identity::from_files(&key, &key).unwrap_err();
    assert!(matches!(error, SetupError::File { .. }) && named(&error, &key), "{error:?}");
    std::fs::set_permissions(&certificate, std::fs::Permissions::from_mode(0o600)).unwrap();
    let error = Identity::from_files(&certificate, &certificate).unwrap_err();
    assert!(matches!(error, SetupError::File { .. }) && named(&error, &certificate), "{error:?}");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let error = Identity::from_files(&certificate, &key).unwrap_err();
    assert!(matches!(error, SetupError::TooOpen { mode: 0o644, .. }) && named(&error, &key), "{error:?}");
}
