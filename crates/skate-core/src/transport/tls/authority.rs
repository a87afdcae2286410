//! The cluster's certificate authority, and this process's certificate.
//!
//! Every process of a cluster computes the same authority from the token, and makes one certificate for itself, with a
//! key of its own that never leaves its memory. A token therefore is the root of all trust, as it is without TLS.
//!
//! Invariant: what [`Leaf::at`] gives is valid at that time and for [`RENEWED_BEFORE_END`] longer, unless making a new one failed.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, PKCS_ED25519,
};
use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::crypto::ring::sign::any_eddsa_type;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use super::TlsError;

/// A private key of Ed25519 in PKCS #8 is this and its 32 bytes (RFC 8410, section 7).
const ED25519_PKCS8: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];

/// How long a certificate is valid. A new one is made when half of it is over.
const LIFETIME: Duration = Duration::from_secs(7 * 24 * 3600);
const RENEWED_BEFORE_END: Duration = Duration::from_secs(LIFETIME.as_secs() / 2);
/// A certificate is valid from so long before it was made, for the clocks of machines differ. A machine whose clock is
/// further behind, or more than [`RENEWED_BEFORE_END`] ahead, is told that its clock is wrong.
const CLOCKS_DIFFER_MAX: Duration = Duration::from_secs(24 * 3600);

pub(super) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    /// The authority whose private key is `seed`. Equal seeds make equal authorities.
    pub(super) fn new(seed: &[u8; 32]) -> Result<Self, TlsError> {
        let mut document = ED25519_PKCS8.to_vec();
        document.extend_from_slice(seed);
        let key = KeyPair::try_from(&PrivatePkcs8KeyDer::from(document))?;
        let mut params = CertificateParams::default();
        params.distinguished_name = name("skate cluster");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Ok(Self { issuer: CertifiedIssuer::self_signed(params, key)? })
    }

    pub(super) fn certificate(&self) -> &CertificateDer<'static> {
        self.issuer.der()
    }

    /// A certificate with a new key, for either end of a connection.
    fn issue(&self, now: SystemTime) -> Result<CertifiedKey, TlsError> {
        let key = KeyPair::generate_for(&PKCS_ED25519)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = name("skate process");
        params.not_before = (now - CLOCKS_DIFFER_MAX).into();
        params.not_after = (now + LIFETIME).into();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &self.issuer)?;
        let signing = any_eddsa_type(&PrivatePkcs8KeyDer::from(key.serialized_der())).map_err(TlsError::Setup)?;
        Ok(CertifiedKey::new(vec![certificate.der().clone()], signing))
    }
}

fn name(common: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common);
    name
}

/// This process's certificate, made anew in time.
pub(super) struct Leaf {
    authority: Authority,
    current: Mutex<(SystemTime, Arc<CertifiedKey>)>,
}

impl Leaf {
    pub(super) fn new(authority: Authority, now: SystemTime) -> Result<Self, TlsError> {
        let first = Arc::new(authority.issue(now)?);
        Ok(Self { authority, current: Mutex::new((now, first)) })
    }

    fn at(&self, now: SystemTime) -> Arc<CertifiedKey> {
        let mut current = self.current.lock();
        // A clock that was set back may be earlier than the beginning.
        let is_fresh = match now.duration_since(current.0) {
            Ok(age) => age < LIFETIME - RENEWED_BEFORE_END,
            Err(back) => back.duration() < CLOCKS_DIFFER_MAX / 2,
        };
        if !is_fresh && let Ok(next) = self.authority.issue(now) {
            *current = (now, Arc::new(next));
        }
        Arc::clone(&current.1)
    }
}

impl std::fmt::Debug for Leaf {
    /// Shows no key: this ends up in logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Leaf").finish_non_exhaustive()
    }
}

impl ResolvesServerCert for Leaf {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.at(SystemTime::now()))
    }
}

impl ResolvesClientCert for Leaf {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.at(SystemTime::now()))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::RootCertStore;
    use rustls::pki_types::UnixTime;
    use rustls::server::ParsedCertificate;

    fn is_accepted(authority: &Authority, leaf: &CertifiedKey, at: SystemTime) -> Result<(), rustls::Error> {
        let mut roots = RootCertStore::empty();
        roots.add(authority.certificate().clone()).unwrap();
        let at = UnixTime::since_unix_epoch(at.duration_since(SystemTime::UNIX_EPOCH).unwrap());
        let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms;
        let parsed = ParsedCertificate::try_from(&leaf.cert[0])?;
        rustls::client::verify_server_cert_signed_by_trust_anchor(&parsed, &roots, &[], at, algorithms.all)
    }

    #[test]
    fn processes_with_one_token_have_one_authority_and_accept_each_other() {
        let (one, other) = (Authority::new(&[1; 32]).unwrap(), Authority::new(&[1; 32]).unwrap());
        assert_eq!(one.certificate(), other.certificate());
        let now = SystemTime::now();
        let leaf = one.issue(now).unwrap();
        assert_ne!(leaf.cert, other.issue(now).unwrap().cert, "each has a key of its own");
        assert_eq!(is_accepted(&other, &leaf, now), Ok(()));
        let stranger = Authority::new(&[2; 32]).unwrap();
        assert!(is_accepted(&stranger, &leaf, now).is_err());
    }

    #[test]
    fn a_certificate_is_valid_for_a_week_and_on_machines_whose_clock_is_a_day_behind() {
        let authority = Authority::new(&[1; 32]).unwrap();
        let now = SystemTime::now();
        let leaf = authority.issue(now).unwrap();
        let hour = Duration::from_secs(3600);
        for (at, accepted) in [
            (now - CLOCKS_DIFFER_MAX + hour, true),
            (now - CLOCKS_DIFFER_MAX - hour, false),
            (now + LIFETIME - hour, true),
            (now + LIFETIME + hour, false),
        ] {
            let outcome = is_accepted(&authority, &leaf, at);
            assert_eq!(outcome.is_ok(), accepted);
            if let Err(error) = outcome {
                assert!(TlsError::Broken(error).to_string().contains("clocks"));
            }
        }
    }

    #[test]
    fn a_certificate_is_made_anew_when_half_of_its_time_is_over_or_the_clock_was_set_back() {
        let now = SystemTime::now();
        let leaf = Leaf::new(Authority::new(&[1; 32]).unwrap(), now).unwrap();
        let first = leaf.at(now);
        let hour = Duration::from_secs(3600);
        assert!(Arc::ptr_eq(&first, &leaf.at(now + RENEWED_BEFORE_END - hour)));
        let second = leaf.at(now + RENEWED_BEFORE_END + hour);
        assert!(!Arc::ptr_eq(&first, &second));
        assert_eq!(is_accepted(&leaf.authority, &second, now + LIFETIME + hour), Ok(()));
        assert!(!Arc::ptr_eq(&second, &leaf.at(now - CLOCKS_DIFFER_MAX)));
    }
}
