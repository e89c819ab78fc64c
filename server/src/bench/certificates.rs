//! Certificates for QEMU's TLS: an authority of this run, a server and a client, in files under the names
//! QEMU wants.
//!
//! Owns: those files. Must not know: who uses them. QEMU insists on key usages that match a certificate's
//! part.

use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

use super::BenchError;

/// The name that the server's certificate is for.
pub(super) const SERVER: &str = "localhost";

/// Writes `ca-cert.pem`, `server-{cert,key}.pem` and `client-{cert,key}.pem`.
pub(super) fn write(dir: &Path) -> Result<(), BenchError> {
    let key = KeyPair::generate()?;
    let mut params = named("mirrorvm bench authority", Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    std::fs::write(dir.join("ca-cert.pem"), params.self_signed(&key)?.pem())?;
    let authority = Issuer::new(params, key);
    for (part, purpose) in
        [("server", ExtendedKeyUsagePurpose::ServerAuth), ("client", ExtendedKeyUsagePurpose::ClientAuth)]
    {
        let key = KeyPair::generate()?;
        let mut params = named(SERVER, vec![SERVER.to_owned()])?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![purpose];
        let certificate = params.signed_by(&key, &authority)?;
        std::fs::write(dir.join(format!("{part}-cert.pem")), certificate.pem())?;
        std::fs::write(dir.join(format!("{part}-key.pem")), key.serialize_pem())?;
    }
    Ok(())
}

fn named(name: &str, alternatives: Vec<String>) -> Result<CertificateParams, BenchError> {
    let mut params = CertificateParams::new(alternatives)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    Ok(params)
}
