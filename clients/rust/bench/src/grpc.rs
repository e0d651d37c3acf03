//! An echo with tonic: what its code generator would write for one unary method.

use super::Failure;
use std::convert::Infallible;
use std::future::{Ready, ready};
use std::pin::Pin;
use std::task::{Context, Poll};
use tonic::body::BoxBody;
use tonic::codec::ProstCodec;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::codegen::{Service, http};
use tonic::server::{Grpc, NamedService, UnaryService};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status};

#[derive(Clone, PartialEq, prost::Message)]
struct Text {
    #[prost(string, tag = "1")]
    text: String,
}

pub async fn connect(address: &str, ca: &str) -> Result<Channel, Failure> {
    let ca = Certificate::from_pem(std::fs::read(ca)?);
    let tls = ClientTlsConfig::new().ca_certificate(ca).domain_name("localhost");
    Ok(Channel::from_shared(format!("https://{address}"))?.tls_config(tls)?.connect().await?)
}

pub async fn echo(channel: Channel, text: &str) -> Result<String, Failure> {
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await?;
    let request = Request::new(Text { text: text.to_owned() });
    let codec: ProstCodec<Text, Text> = ProstCodec::default();
    let response = client.unary(request, PathAndQuery::from_static("/bench.Echo/Echo"), codec).await?;
    Ok(response.into_inner().text)
}

pub async fn serve(certificate: &str, key: &str) -> Result<(), Failure> {
    let identity = Identity::from_pem(std::fs::read(certificate)?, std::fs::read(key)?);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    println!("tonic: listening on {}", listener.local_addr()?);
    let mut server = Server::builder().tls_config(ServerTlsConfig::new().identity(identity))?;
    let address = listener.local_addr()?;
    drop(listener);
    Ok(server.add_service(EchoServer).serve(address).await?)
}

#[derive(Clone)]
struct EchoServer;

impl NamedService for EchoServer {
    const NAME: &'static str = "bench.Echo";
}

struct Echo;

impl UnaryService<Text> for Echo {
    type Response = Text;
    type Future = Ready<Result<Response<Text>, Status>>;

    fn call(&mut self, request: Request<Text>) -> Self::Future {
        ready(Ok(Response::new(request.into_inner())))
    }
}

impl Service<http::Request<BoxBody>> for EchoServer {
    type Response = http::Response<BoxBody>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<BoxBody>) -> Self::Future {
        Box::pin(async move {
            let codec: ProstCodec<Text, Text> = ProstCodec::default();
            Ok(Grpc::new(codec).unary(Echo, request).await)
        })
    }
}
