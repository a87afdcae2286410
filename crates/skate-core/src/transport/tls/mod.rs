//! TLS 1.3 between the processes of different nodes.
//!
//! Everything that names the TLS library is here. Both ends show a certificate of the cluster's authority, whose key
//! follows from the token (`authority`), so that nobody makes, hands out or renews files. Names are not looked at: a
//! process is whoever has a certificate of this cluster, and who exactly it is the handshake within proves
//! (`skate_proto::handshake`), bound to this very connection by the value of [`Channel::binding`].
//!
//! A [`Channel`] is one connection's half of TLS. It has bytes given and taken, and touches no socket by itself, so that
//! the reactor, [`discover`](super::discover) and a thread that blocks can all use it.
//!
//! Nothing of TLS 1.2 is compiled in. There are no tickets and no early data: a connection lives as long as its
//! processes talk, so resuming would save nothing, and early data could be replayed.

mod authority;
mod channel;

use std::sync::{Arc, OnceLock};

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, Error, PeerIncompatible,
    RootCertStore, ServerConfig, ServerConnection, SignatureScheme,
};
use thiserror::Error;

use skate_proto::handshake::Credentials;

use authority::{Authority, Leaf};
pub(super) use channel::{Channel, Taken};

/// What a client must name. It is neither sent nor compared.
const NO_NAME: &str = "skate";

/// Why a connection is not, or no longer, secured.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TlsError {
    #[error("this process could not make its certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    #[error("this process cannot use TLS: {0}")]
    Setup(#[source] Error),
    #[error("{}", explain(.0))]
    Broken(#[source] Error),
}

/// What went wrong on a connection, and what may be the reason.
fn explain(error: &Error) -> String {
    use CertificateError as Certificate;
    let clocks = "see that the clocks of both machines agree";
    match error {
        Error::InvalidCertificate(
            Certificate::Expired
            | Certificate::ExpiredContext { .. }
            | Certificate::NotValidYet
            | Certificate::NotValidYetContext { .. },
        ) => format!("the peer's certificate is not valid at this machine's time: {clocks} ({error})"),
        Error::InvalidCertificate(_)
        | Error::PeerIncompatible(PeerIncompatible::NoCertificateRequestSignatureSchemesInCommon) => {
            format!("the peer has no certificate of this cluster, so it does not know the cluster token ({error})")
        }
        Error::AlertReceived(AlertDescription::CertificateExpired) => {
            format!("this process's certificate is not valid at the time of the peer's machine: {clocks} ({error})")
        }
        Error::AlertReceived(
            AlertDescription::UnknownCA | AlertDescription::BadCertificate | AlertDescription::DecryptError,
        ) => format!(
            "the peer does not accept this process's certificate: start both sides with the same token ({error})"
        ),
        Error::InvalidMessage(_) | Error::InappropriateMessage { .. } => {
            format!("what the peer sent is not TLS as it should be ({error})")
        }
        Error::DecryptError => "what the peer sent was changed on its way, or is not from it".to_owned(),
        _ => format!("TLS failed ({error})"),
    }
}

/// What a process needs to secure its connections with other nodes.
pub(super) struct ClusterTls {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl ClusterTls {
    pub(super) fn new(credentials: &Credentials) -> Result<Self, TlsError> {
        let authority = Authority::new(&credentials.certificate_seed())?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.certificate().clone()).map_err(TlsError::Setup)?;
        let roots = Arc::new(roots);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let leaf = Arc::new(Leaf::new(authority, std::time::SystemTime::now())?);
        Ok(Self {
            client: Arc::new(client_config(&provider, &roots, &leaf)?),
            server: Arc::new(server_config(&provider, roots, leaf)?),
        })
    }

    /// Our half of a connection that this process opens.
    pub(super) fn connect(&self) -> Result<Channel, TlsError> {
        let name = ServerName::try_from(NO_NAME).expect("a valid name");
        let connection = ClientConnection::new(Arc::clone(&self.client), name).map_err(TlsError::Setup)?;
        Ok(Channel::new(connection.into()))
    }

    /// Our half of a connection that was opened to this process.
    pub(super) fn accept(&self) -> Result<Channel, TlsError> {
        let connection = ServerConnection::new(Arc::clone(&self.server)).map_err(TlsError::Setup)?;
        Ok(Channel::new(connection.into()))
    }
}

/// What secures a process's connections with other nodes, made when the first of them needs it: processes whose peers
/// are all on their own node never do.
pub struct NodeTls {
    credentials: Credentials,
    made: OnceLock<ClusterTls>,
}

impl NodeTls {
    pub(super) fn new(credentials: Credentials) -> Self {
        Self { credentials, made: OnceLock::new() }
    }

    pub(super) fn get(&self) -> Result<&ClusterTls, TlsError> {
        if let Some(made) = self.made.get() {
            return Ok(made);
        }
        let new = ClusterTls::new(&self.credentials)?;
        Ok(self.made.get_or_init(|| new))
    }
}

fn client_config(
    provider: &Arc<CryptoProvider>,
    roots: &Arc<RootCertStore>,
    leaf: &Arc<Leaf>,
) -> Result<ClientConfig, TlsError> {
    let algorithms = provider.signature_verification_algorithms;
    let verifier = Arc::new(OfCluster { roots: Arc::clone(roots), algorithms });
    let mut config = ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&TLS13])
        .map_err(TlsError::Setup)?
        .dangerous() // Our verifier is not the library's. It checks everything but the name.
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::<Leaf>::clone(leaf));
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(config)
}

fn server_config(
    provider: &Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    leaf: Arc<Leaf>,
) -> Result<ServerConfig, TlsError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(provider))
        .clear_root_hint_subjects()
        .build()
        .map_err(|error| TlsError::Setup(Error::General(error.to_string())))?;
    let mut config = ServerConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&TLS13])
        .map_err(TlsError::Setup)?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(leaf);
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Accepts a server that has a certificate of the cluster's authority, whatever it is called.
#[derive(Debug)]
struct OfCluster {
    roots: Arc<RootCertStore>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for OfCluster {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        rustls::client::verify_server_cert_signed_by_trust_anchor(
            &certificate,
            &self.roots,
            intermediates,
            now,
            self.algorithms.all,
        )?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(PeerIncompatible::ServerDoesNotSupportTls12Or13))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Both ends of a connection, new and established, against a peer that sends these bytes.
///
/// # Panics
/// If they make an end believe anything.
pub(crate) fn bear(bytes: &[u8]) {
    static CLUSTER: std::sync::LazyLock<ClusterTls> = std::sync::LazyLock::new(|| {
        let credentials = Credentials { session: [3; 16], token: [4; 32] };
        ClusterTls::new(&credentials).expect("the system gives random bytes")
    });
    let (client, server) = established(&CLUSTER);
    let new = [CLUSTER.connect(), CLUSTER.accept()].map(|new| new.expect("a configuration that serves"));
    for channel in new.into_iter().chain([client, server]) {
        drop(channel.opening());
        let (mut incoming, mut plain) = (bytes, Vec::new());
        loop {
            let before = incoming.len();
            let into_nothing = |parts: &[std::io::IoSlice<'_>]| Ok(parts.iter().map(|part| part.len()).sum());
            match channel.take(&mut incoming, &mut plain, into_nothing) {
                Ok(taken) if incoming.len() < before && !taken.ended => {}
                Ok(_) => break,
                Err(error) => {
                    let _ = error.to_string();
                    break;
                }
            }
        }
        assert!(plain.is_empty(), "a stranger was heard");
    }
}

/// Two ends that have shaken hands.
fn established(cluster: &ClusterTls) -> (Channel, Channel) {
    let (client, server) = (cluster.connect(), cluster.accept());
    let (client, server) = (client.expect("a configuration that serves"), server.expect("a configuration that serves"));
    let (mut to_server, mut is_established) = (client.opening(), false);
    let answer = |channel: &Channel, incoming: &[u8]| {
        let out = parking_lot::Mutex::new(Vec::new());
        let write = |parts: &[std::io::IoSlice<'_>]| {
            let mut out = out.lock();
            parts.iter().for_each(|part| out.extend_from_slice(part));
            Ok(parts.iter().map(|part| part.len()).sum())
        };
        let (mut incoming, mut established) = (incoming, false);
        while !incoming.is_empty() {
            let taken = channel.take(&mut incoming, &mut Vec::new(), write).expect("both are of one cluster");
            established |= taken.established;
        }
        (out.into_inner(), established)
    };
    while !is_established {
        let (to_client, done) = answer(&server, &to_server);
        is_established = done;
        to_server = answer(&client, &to_client).0;
    }
    (client, server)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn pair() -> (Channel, Channel) {
        established(&ClusterTls::new(&Credentials { session: [3; 16], token: [4; 32] }).unwrap())
    }
}
